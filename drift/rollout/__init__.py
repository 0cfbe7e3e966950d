"""Rollouts: block-wise denoising and the feedback that it leaves."""

from drift.rollout.cache import PrefixCache
from drift.rollout.config import DenoiseConfig
from drift.rollout.denoise import denoise
from drift.rollout.groups import concatenate, rollout_groups

__all__ = ["DenoiseConfig", "PrefixCache", "concatenate", "denoise", "rollout_groups"]
