"""What a folder holds, read before its weights: errors say what was found and what is supported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from drift.contract import ConfigError

# How each family's tensors begin on the hub.
TENSOR_PREFIXES = {"llada": "model.transformer.blocks.", "Dream": "model.layers."}


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in a folder's safetensors, from their headers alone.

    Raises:
        SafetensorError: where a file is damaged or cut short.
    """
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names += list(opened.keys())
    return names


def require_weights(folder: Path, model_type: str, key: str) -> None:
    """Raises ConfigError where a folder has no safetensors, or those of another family.

    Args:
        folder: with a config.json.
        model_type: what that says.
        key: the setting that the folder comes from.
    """
    found = sorted(p.name for p in folder.iterdir())
    if not any(name.endswith(".safetensors") for name in found):
        pickled = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        why = f" ({', '.join(pickled)}: pickled weights can run code and are never read; convert them)"
        raise ConfigError(
            f"{key} is {str(folder)!r}: it has no *.safetensors weights, only {found}{why if pickled else ''}"
        )
    try:
        names = tensor_names(folder)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{key} is {str(folder)!r}: its safetensors cannot be read ({type(error).__name__}: {error}); a "
            "file is damaged or cut short: copy or download it again"
        ) from error
    counts = Counter(
        family for name in names for family, prefix in TENSOR_PREFIXES.items() if name.startswith(prefix)
    )
    if counts and model_type not in counts:
        other = counts.most_common(1)[0][0]
        example = next(name for name in names if name.startswith(TENSOR_PREFIXES[other]))
        raise ConfigError(
            f"{key} is {str(folder)!r}: its tensors are named as in a {other} checkpoint, such as {example}, "
            f"its config.json has model_type: {model_type!r}; use the config.json that came with the weights"
        )


def unsupported_type(folder: Path, config: Mapping[str, Any], supported: list[str], key: str) -> ConfigError:
    """The error for a model_type that no family of drift has.

    Args:
        folder: with a config.json.
        config: what that holds.
        supported: the model types that there are classes for.
        key: the setting that the folder comes from.
    """
    code = sorted(p.name for p in folder.glob("*.py"))
    why = ""
    if config.get("auto_map") or code:
        names = ", ".join(code) or config["auto_map"]
        why = f"; its model exists only as code of the folder ({names}), which is never run"
    return ConfigError(
        f"{key} is {str(folder)!r}: its config.json has model_type: {config.get('model_type')!r}; "
        f"supported: {supported}{why}"
    )


def require_sizes(config: object, keys: Sequence[str]) -> None:
    """Raises ConfigError where one of a configuration's sizes is no positive whole number."""
    for key in keys:
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"config.json has {key}: {value!r}; it must be a positive whole number")


def require_values(config: Any, family: str, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ConfigError where a configuration asks for what its family's class does not compute.

    Args:
        config: of the checkpoint.
        family: its name, for the message.
        supported: the values that each key may have; a key that is absent has the first one.
    """
    size = config.vocab_size
    for key, values in supported.items():
        found = getattr(config, key, values[0])
        if found not in values:
            raise ConfigError(f"config.json has {key}: {found!r}; supported for {family}: {list(values)}")
    for key in ("mask_token_id", "pad_token_id"):
        value = getattr(config, key)
        if not isinstance(value, int) or not 0 <= value < size:
            raise ConfigError(
                f"config.json has {key}: {value!r}; it must be a token id below vocab_size {size}"
            )
