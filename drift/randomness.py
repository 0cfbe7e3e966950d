"""Random draws keyed by what they are for, not by the order in which they are made.

A key is an int64. `fold` derives a new key from a key and integers (seed, step, sample, position ...);
`uniform` turns keys into numbers. The same key gives the same number on every device, in every batch and on
every rank, so a sample does not depend on its neighbours. The mixing function is SplitMix64's finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drift.contract import ConfigError

_GOLDEN_RATIO = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def fold(key: Tensor | int, *parts: Tensor | int) -> Tensor:
    """New keys, one for each combination of a key with the given integers.

    Args:
        key: int64 key or keys.
        parts: integers, or int64 tensors that broadcast with `key`.

    Returns:
        int64 tensor of the broadcast shape.
    """
    key = torch.as_tensor(key, dtype=torch.int64)
    for part in parts:
        key = _mix(_mix(key + _GOLDEN_RATIO) + part)
    return key


def uniform(key: Tensor) -> Tensor:
    """Numbers in (0, 1), float64 of the key's shape, uniform over distinct keys."""
    return (_shift_right(_mix(key + _GOLDEN_RATIO), 12).double() + 0.5) * 2.0**-52


def draw_keys(
    num: int, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """[num] int64 keys drawn from a generator (torch's default one where None)."""
    source = generator.device if generator is not None else torch.device("cpu")
    keys = torch.randint(-(2**63), 2**63 - 1, (num,), generator=generator, device=source)
    return keys.to(device) if device is not None else keys


def run_seed(seed: int | None) -> int:
    """A seed, or where it is None that of Lightning's `seed_everything` (0 where that was not called).

    Raises:
        ConfigError: where it does not fit into 64 bits.
    """
    if seed is None:
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed is {seed}: set it to a number of 64 bits, such as 0")
    return seed


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global random stream: Python's, NumPy's, torch's and the device's.

    Drift's own draws need none of them; a reward, a task or a layer with dropout may.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - others' code draws from it
    state: dict[str, Any] = {
        "python": list(random.getstate()),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device).cpu()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts every global random stream where `random_state` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
