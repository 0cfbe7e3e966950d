"""Policies: the `DiffusionLM` interface, the families that implement it, loading and saving."""

from drift.models.base import DiffusionLM, KeyValueCache
from drift.models.dream import Dream, DreamConfig
from drift.models.llada import LLaDA, LLaDAConfig
from drift.models.loading import (
    load_policy,
    load_tokenizer,
    read_config,
    require_matching_tokenizer,
    require_reference,
    resolve_folder,
)
from drift.models.snapshot import trainable_weights, weights_of

__all__ = [
    "DiffusionLM",
    "Dream",
    "DreamConfig",
    "KeyValueCache",
    "LLaDA",
    "LLaDAConfig",
    "load_policy",
    "load_tokenizer",
    "read_config",
    "require_matching_tokenizer",
    "require_reference",
    "resolve_folder",
    "trainable_weights",
    "weights_of",
]
