"""What a policy looks like without its weights: by its config.json, or for known checkpoints by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from drift.contract import ConfigError
from drift.models.base import DiffusionLM
from drift.models.loading import FAMILIES, read_config, resolve_folder

# Hub ids whose config.json says what the defaults of their model_type's config class say.
KNOWN: dict[str, tuple[str, ...]] = {
    "llada": ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5"),
    "Dream": ("Dream-org/Dream-v0-Base-7B", "Dream-org/Dream-v0-Instruct-7B"),
}


def find_config(path: str | Path, key: str = "model.policy") -> tuple[type[DiffusionLM], Any, str]:
    """A policy's class, its configuration, and in words where that came from; nothing is downloaded.

    Args:
        path: what `resolve_folder` takes; a hub id that is not in the hub's cache must be a known one.
        key: the setting that the path comes from, for error messages.

    Raises:
        ConfigError: where there is no such policy, or its configuration is not one that drift computes.
    """
    name = str(path)
    folder = Path(path).expanduser()
    if not folder.is_dir() and len(folder.parts) == 2 and not folder.is_absolute():
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            return _known(name, key)
        folder = Path(cached).parent
    else:
        folder = resolve_folder(path, key)
    family: Any = FAMILIES[read_config(folder, key)["model_type"]]
    config = family.config_class.from_pretrained(folder)
    config.require_supported()
    return family, config, f"config.json of {name}"


def _known(name: str, key: str) -> tuple[type[DiffusionLM], Any, str]:
    for model_type, names in KNOWN.items():
        if name in names:
            family: Any = FAMILIES[model_type]
            return family, family.config_class(), f"the known sizes of {name}, which is not on this machine"
    known = [name for names in KNOWN.values() for name in names]
    raise ConfigError(
        f"{key} is {name!r}: there is no such folder, it is not in the hub's cache, and its sizes are not "
        f"known; give the path of a Hugging Face folder, or one of {known}"
    )
