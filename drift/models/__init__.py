"""Policies: the `DiffusionLM` interface, the families that implement it, loading and saving."""

from drift.models.adapters import (
    LoRAConfig,
    adapters_off,
    add_adapters,
    fingerprint,
    merged_state_dict,
    reference_of,
    require_adapters,
)
from drift.models.base import DiffusionLM
from drift.models.dream import Dream, DreamConfig
from drift.models.layers import KeyValueCache
from drift.models.llada import LLaDA, LLaDAConfig
from drift.models.loading import (
    load_policy,
    policy_skeleton,
    read_config,
    require_reference,
    resolve_folder,
)
from drift.models.snapshot import trainable_weights, weights_digest, weights_of
from drift.models.tokenizers import load_tokenizer, require_matching_tokenizer

__all__ = [
    "DiffusionLM",
    "Dream",
    "DreamConfig",
    "KeyValueCache",
    "LLaDA",
    "LLaDAConfig",
    "LoRAConfig",
    "adapters_off",
    "add_adapters",
    "fingerprint",
    "load_policy",
    "load_tokenizer",
    "merged_state_dict",
    "policy_skeleton",
    "read_config",
    "reference_of",
    "require_adapters",
    "require_matching_tokenizer",
    "require_reference",
    "resolve_folder",
    "trainable_weights",
    "weights_digest",
    "weights_of",
]
