"""Timestep samplers: which noisy states of a rollout the policy gradient is estimated from."""

from drift.samplers.base import TimestepSampler
from drift.samplers.full import FullSampler
from drift.samplers.masks import AllMaskSampler, CoupledMaskSampler, RandomMaskSampler
from drift.samplers.proportional import ProportionalSampler
from drift.samplers.sequence import CoupledElboSampler, QuadratureElboSampler, SandwichedSampler
from drift.samplers.trace import StepSampler, TraceSampler
from drift.samplers.weighted import UniformSampler, WeightedSampler

__all__ = [
    "AllMaskSampler",
    "CoupledElboSampler",
    "CoupledMaskSampler",
    "FullSampler",
    "ProportionalSampler",
    "QuadratureElboSampler",
    "RandomMaskSampler",
    "SandwichedSampler",
    "StepSampler",
    "TimestepSampler",
    "TraceSampler",
    "UniformSampler",
    "WeightedSampler",
]
