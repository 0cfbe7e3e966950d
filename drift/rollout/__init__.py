"""Rollouts: block-wise denoising and the feedback that it leaves."""

from drift.rollout.cache import PrefixCache
from drift.rollout.config import DenoiseConfig
from drift.rollout.denoise import denoise
from drift.rollout.groups import rollout_groups

__all__ = ["DenoiseConfig", "PrefixCache", "denoise", "rollout_groups"]
