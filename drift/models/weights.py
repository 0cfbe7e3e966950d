"""Weights from safetensors files straight into a policy: one copy in memory, in the dtype asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: the one, or the shards of its index; else none."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        return []
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def read_weights(
    model: nn.Module, files: list[Path], dtype: torch.dtype, *, copy: bool = True
) -> dict[str, list[Any]]:
    """Gives a model made on the meta device its parameters, and says what did not fit.

    Nothing is read where something does not fit.

    Args:
        model: on the meta device; parameters that it has under several names are one afterwards, too.
        files: safetensors files that together hold every parameter once.
        dtype: what the parameters are cast to.
        copy: False leaves what needs no cast in the files' pages, which all processes share, until it is
            sharded: a view of a file changes when the file does.

    Returns:
        `missing` and `unexpected` names, and `mismatched` (name, shape in the file, shape in the model).
    """
    names: dict[int, list[str]] = {}
    shapes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        shapes[name] = list(parameter.shape)
    places, stored = {}, {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                places[name], stored[name] = file, list(tensors.get_slice(name).get_shape())
    report: dict[str, list[Any]] = {
        "missing": [group[0] for group in names.values() if not set(group) & set(places)],
        "unexpected": [name for name in places if name not in shapes],
        "mismatched": [
            (name, shape, shapes[name])
            for name, shape in stored.items()
            if name in shapes and shape != shapes[name]
        ],
    }
    if any(report.values()):
        return report
    for group in names.values():
        name = next(name for name in group if name in places)
        # Opened anew for each tensor: the pages of a file that stays open count as a second copy.
        with safe_open(places[name], framework="pt") as tensors:
            value = nn.Parameter(tensors.get_tensor(name).to(dtype, copy=copy))
        for place in group:
            owner, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(owner), leaf, value)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return report


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new parameters have a dtype from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
