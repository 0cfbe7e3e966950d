"""What the tests of the memory plan share: a meter of the memory that tensors take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drift.plan import PlanSettings, policy_sizes
from drift.rollout import DenoiseConfig


class Meter(TorchDispatchMode):
    """A context that records the most bytes that tensors made within it had at one time."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes or key in self.known:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@pytest.fixture
def meter() -> Callable[..., Meter]:
    """Makes meters; tensors given to one do not count."""
    return Meter


@pytest.fixture(scope="session")
def known_8b() -> Callable[..., PlanSettings]:
    """Makes the settings of the 8B recipe, which is planned without its weights."""
    policy = policy_sizes("GSAI-ML/LLaDA-8B-Instruct")
    decode = DenoiseConfig(temperature=1.0, use_cache=True, horizon=128)

    def make(**changes: object) -> PlanSettings:
        recipe = {
            "policy": policy,
            "beta": 0.01,
            "precision": "bf16-mixed",
            "micro_batch_size": 4,
            "evaluation_batch_size": 16,
            "rollout_batch_size": 32,
            "decode": decode,
            "evaluation": decode,
        }
        return PlanSettings(**recipe | changes)  # pyright: ignore

    return make
