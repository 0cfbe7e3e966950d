"""Policies from Hugging Face folders; nothing is unpickled and no hub code is loaded."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError

from drift.contract import ConfigError
from drift.models.base import DiffusionLM
from drift.models.dream import Dream
from drift.models.inspection import require_weights, unsupported_type
from drift.models.llada import LLaDA
from drift.models.weights import INDEX, WHOLE, default_dtype, read_weights, weight_files
from drift.models.writing import read_texts

FAMILIES: dict[str, type[DiffusionLM]] = {"llada": LLaDA, "Dream": Dream}
# Code is never run; an export takes it along, for whoever loads that with the original code base.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]


def resolve_folder(path: str | Path, key: str = "model.policy") -> Path:
    """The local folder that a policy's name stands for.

    Args:
        path: a Hugging Face folder; or the bare name of a policy that comes with drift, such as
            `sudoku_base`; or a hub id `owner/name`, which is taken from the hub's cache or downloaded
            (weights and texts, never code).
        key: the setting that the path comes from, for the error message.

    Raises:
        ConfigError: where there is no such folder.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    shipped = Path(str(files("drift"))) / "assets"
    if len(folder.parts) == 1 and (shipped / folder).is_dir():
        return shipped / folder
    names = sorted(p.name for p in shipped.iterdir()) if shipped.is_dir() else []
    if len(folder.parts) == 2 and not folder.is_absolute() and not folder.parts[0].startswith("."):
        try:
            return Path(snapshot_download(str(path), allow_patterns=_PATTERNS))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            raise ConfigError(
                f"{key} is {str(path)!r}: there is no such folder, and no such model in the hub's cache or "
                f"in its reach ({type(error).__name__}); give the path of a Hugging Face folder"
            ) from error
    raise ConfigError(
        f"{key} is {str(path)!r}: there is no such folder; give the path of a Hugging Face folder, a hub id "
        f"owner/name, or one of the policies that come with drift: {names}"
    )


def read_config(folder: Path, key: str = "model.policy") -> dict[str, Any]:
    """The folder's config.json, checked to be of a family that drift knows."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = sorted(p.name for p in folder.iterdir())
        raise ConfigError(f"{key} is {str(folder)!r}: it has no config.json, only {found}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} is {str(folder)!r}: its config.json is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{key} is {str(folder)!r}: its config.json holds {type(config).__name__}, no object"
        )
    if config.get("model_type") not in list(FAMILIES):
        raise unsupported_type(folder, config, sorted(FAMILIES), key)
    return config


def load_policy(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    random_init: bool = False,
    copy: bool = True,
    key: str = "model.policy",
) -> DiffusionLM:
    """The policy stored in a Hugging Face folder, in train mode, chosen by config.json's model_type.

    Args:
        path: what `resolve_folder` takes.
        dtype: dtype of the parameters.
        random_init: fresh weights (from torch's default generator) instead of the folder's.
        copy: False leaves weights in the files' pages, for a policy that is sharded at once.
        key: the setting that the path comes from, for error messages.

    Raises:
        ConfigError: where folder, configuration or weights are missing, damaged or of another shape.
    """
    folder = resolve_folder(path, key)
    if random_init:
        family, config = _family(folder, key)
        with default_dtype(dtype):
            policy = family(config)
        policy.texts = read_texts(folder)
        return policy.train()
    policy = policy_skeleton(folder, key)
    policy.texts = read_texts(folder)
    require_weights(folder, policy.config.model_type, key)
    try:
        files = weight_files(folder)
        report = read_weights(policy, files, dtype, copy=copy) if files else None
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:  # a bad index raises the last three
        raise ConfigError(
            f"{key} is {str(folder)!r}: its safetensors cannot be read ({type(error).__name__}: {error}); a "
            "file, or the index of the shards, is damaged or cut short: copy or download it again"
        ) from error
    if report is None:
        found = sorted(p.name for p in folder.iterdir())
        raise ConfigError(
            f"{key} is {str(folder)!r}: it has no *.safetensors weights ({WHOLE}, or shards and {INDEX}), "
            f"only {found}"
        )
    _require_complete(folder, report, key)
    return policy.train()


def policy_skeleton(path: str | Path, key: str = "model.policy") -> DiffusionLM:
    """The policy of a Hugging Face folder without weights: its parameters are on the meta device.

    Args:
        path: what `resolve_folder` takes.
        key: the setting that the path comes from, for error messages.
    """
    family, config = _family(resolve_folder(path, key), key)
    with torch.device("meta"):
        return family(config)


def _family(folder: Path, key: str) -> tuple[Any, Any]:
    family: Any = FAMILIES[read_config(folder, key)["model_type"]]
    config = family.config_class.from_pretrained(folder)
    config.require_supported()
    return family, config


def _require_complete(folder: Path, report: dict[str, Any], key: str) -> None:
    """Raises ConfigError where weights are missing, unknown or of another shape."""
    faults = {
        "missing": sorted(report["missing"]),
        "not part of the model": sorted(report["unexpected"]),
        "of another shape (tensor, file, model)": sorted(report["mismatched"]),
    }
    found = [f"{len(names)} tensors {what}, such as {names[:3]}" for what, names in faults.items() if names]
    if found:
        raise ConfigError(
            f"{key} is {str(folder)!r}: its weights do not fit its config.json: {'; '.join(found)}; "
            "config.json and the safetensors must come from the same checkpoint"
        )


def require_reference(path: str | Path, policy_config: dict[str, Any]) -> None:
    """Raises ConfigError where there is no such reference, or it speaks of other tokens than the policy."""
    reference_config = read_config(resolve_folder(path, "model.reference"), "model.reference")
    for key in ("vocab_size", "mask_token_id", "pad_token_id"):
        ours, theirs = policy_config.get(key), reference_config.get(key)
        if ours != theirs:
            raise ConfigError(
                f"model.reference is {str(path)!r}: its config.json has {key}: {theirs!r}, the policy's "
                f"has {ours!r}; use a reference with the policy's tokenizer"
            )
