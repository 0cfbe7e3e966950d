"""Timestep samplers: which noisy states of a rollout the policy gradient is estimated from."""

from drift.samplers.base import TimestepSampler
from drift.samplers.full import FullSampler
from drift.samplers.masks import AllMaskSampler, CoupledMaskSampler, RandomMaskSampler
from drift.samplers.weighted import UniformSampler, WeightedSampler

__all__ = [
    "AllMaskSampler",
    "CoupledMaskSampler",
    "FullSampler",
    "RandomMaskSampler",
    "TimestepSampler",
    "UniformSampler",
    "WeightedSampler",
]
