"""Hugging Face folders as the original code base of a model reads them: what came in is what goes out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor

from drift.contract import ConfigError
from drift.models.weights import weight_files

ExportDType = Literal["source", "float32", "bfloat16", "float16"]
# All of a folder but its weights: configurations, tokenizer files, and code, which is copied, never run.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth)(\.index\.json)?")
_TOKENIZER = re.compile(
    r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template|tokenization_.*)\.\w+"
)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9}


def write_folder(
    state: Mapping[str, Tensor],
    source: Path,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    dtype: ExportDType = "source",
    max_shard_size: str = "5GB",
    chat_template: str | None = None,
) -> None:
    """Writes a policy's weights as a folder of the same tensor names, shapes and config keys as its source.

    The folder appears whole: it is written beside its place and renamed.

    Args:
        state: weights under the hub's names.
        source: the folder that the policy was loaded from; all its files but weights come along unchanged.
        folder: where to; an earlier policy there is replaced, anything else is refused.
        tokenizer: the folder of another tokenizer; None: the source's own.
        dtype: of the weights; `source` gives each tensor the one that it came in.
        max_shard_size: of one safetensors file, such as 5GB or 500MB.
        chat_template: jinja text that the policy was prompted with; None: the tokenizer's own, or none.

    Raises:
        ConfigError: where an option is none, the folder holds something else, or the weights are not the
            source's.
    """
    require_export_options(dtype, max_shard_size)
    require_exportable(folder, source)
    names = _source_dtypes(source) or {name: value.dtype for name, value in state.items()}
    missing = sorted(set(names) - set(state))
    # A tied head is in the state under both of its names, in the file under one.
    extra = sorted(name for name in set(state) - set(names) if not _is_tied(name, names, state))
    if missing or extra:
        raise ConfigError(
            f"the weights do not fit the folder {str(source)!r}: missing {missing[:3]}, unknown {extra[:3]}; "
            "give the folder that the policy was loaded from"
        )
    found = {
        name: state[name].detach().to(kept if dtype == "source" else getattr(torch, dtype)).contiguous()
        for name, kept in names.items()
    }
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    # Cloned where two names share a storage, which safetensors would write once.
    save_torch_state_dict(_unshared(found), new, max_shard_size=max_shard_size, metadata={"format": "pt"})
    for name, file in companions(source, tokenizer).items():
        shutil.copyfile(file, new / name)
    # safetensors lets nobody but the owner read its files; these are for whoever reads the configuration.
    for file in new.glob("*.safetensors"):
        file.chmod((new / "config.json").stat().st_mode)
    if dtype != "source":
        _set_dtype(new / "config.json", dtype)
    if chat_template is not None:
        (new / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    _replace(new, folder)


def companions(source: Path, tokenizer: Path | None = None) -> dict[str, Path]:
    """The files of a folder that are no weights, by name; those of the tokenizer perhaps from another one."""
    found = {
        file.name: file
        for pattern in _COMPANIONS
        for file in sorted(source.glob(pattern))
        if not _WEIGHTS.fullmatch(file.name)
    }
    if tokenizer is None or tokenizer.resolve() == source.resolve():
        return found
    ours = {name: file for name, file in found.items() if not _TOKENIZER.fullmatch(name)}
    theirs = {name: file for name, file in companions(tokenizer).items() if _TOKENIZER.fullmatch(name)}
    return ours | theirs


def read_texts(folder: Path) -> dict[str, str]:
    """The configurations of a folder that weights are saved with, by file name."""
    names = ("config.json", "generation_config.json")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}


def restore_texts(folder: Path, texts: Mapping[str, str], dtype: str) -> None:
    """Writes configurations as `read_texts` gave them, but for the dtype that the weights have now."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if texts:
        _set_dtype(folder / "config.json", dtype)


def require_exportable(folder: Path, source: Path | None = None) -> None:
    """Raises ConfigError where a folder to write holds what is no policy, or is the source itself."""
    if source is not None and folder.resolve() == source.resolve():
        raise ConfigError(f"the folder to write is {str(folder)!r}, the policy's own; name another one")
    if folder.is_file():
        raise ConfigError(f"the folder to write is {str(folder)!r}: that is a file; name a folder")
    found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in found if not _is_part(folder / name)]
    whole = "config.json" in found and any(name.endswith(".safetensors") for name in found)
    if found and (strange or not whole):
        raise ConfigError(
            f"the folder to write is {str(folder)!r}: it holds {(strange or found)[:3]}, which would be "
            "lost; name a new folder, or one that holds a policy and nothing else"
        )


def _is_part(file: Path) -> bool:
    if _WEIGHTS.fullmatch(file.name):
        return True
    return file.is_file() and any(file.match(pattern) for pattern in _COMPANIONS)


def require_export_options(dtype: str, max_shard_size: str) -> None:
    """Raises ConfigError where an export's dtype or shard size is none."""
    if dtype not in get_args(ExportDType):
        raise ConfigError(f"dtype is {dtype!r}: choose one of {list(get_args(ExportDType))}")
    size = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", max_shard_size, re.IGNORECASE)
    if size is None or int(size[1]) * _BYTES[size[2].lower()] == 0:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}: give a size such as 5GB or 500MB")


def _source_dtypes(source: Path) -> dict[str, torch.dtype]:
    """Name and dtype of every tensor in a folder's safetensors, from their headers; empty without any."""
    found = {}
    # Of the files that loading reads: others, such as an adapter's, are no part of the policy.
    for file in weight_files(source):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                found[name] = _DTYPES[opened.get_slice(name).get_dtype()]
    return found


def _is_tied(name: str, names: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    value, others = state[name], [state[other] for other in names if other in state]
    if any(other.data_ptr() == value.data_ptr() for other in others):
        return True
    # Gathered from several ranks, the two have a storage each.
    return value.dim() == 2 and any(torch.equal(other, value) for other in others)


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    found = {}
    for name, value in state.items():
        found[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return found


def _set_dtype(file: Path, dtype: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    # The key that the file has: older code bases read torch_dtype, newer ones dtype.
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    if config.get(key) == dtype:
        return  # not a byte is changed
    file.write_text(json.dumps(config | {key: dtype}, indent=2) + "\n", encoding="utf-8")


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
