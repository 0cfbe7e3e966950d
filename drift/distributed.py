"""Everything that knows about ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from drift.contract import ConfigError, SampleError


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first_process() -> bool:
    """Whether this is the first rank's process; known before the ranks have met, by what launched them."""
    return getattr(rank_zero_only, "rank", 0) == 0


def ranks_store(timeout: timedelta) -> Store:
    """A connection of one's own to the store through which the ranks have met, for one thread.

    Args:
        timeout: how long to wait for a value.
    """
    # The ranks' own is in use by their collectives, and a thread that waits in it would hold those up.
    default: Any = _get_default_store()
    store = PrefixStore("drift", default.clone())
    store.set_timeout(timeout)
    return store


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank; not differentiable."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gather_over_ranks(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """A context that every rank must enter: a SampleError of one of them is raised on all.

    One rank alone would stop, while the others wait for it.
    """
    error = None
    try:
        yield
    except SampleError as found:
        error = found
    messages = gather_over_ranks(None if error is None else str(error))
    for number, message in enumerate(messages):
        if error is None and message is not None:
            error = SampleError(f"rank {number}: {message}", {"rank": number})
    if error is not None:
        error.on_all_ranks = True
        raise error


def highest_over_ranks(value: Tensor) -> Tensor:
    """The element-wise largest of the ranks' tensors, on every rank; not differentiable."""
    if world_size() == 1:
        return value
    highest = value.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of the ranks' whole numbers, on every rank.

    Args:
        value: this rank's number.
        device: where the ranks communicate.
    """
    return value if world_size() == 1 else int(highest_over_ranks(torch.tensor(value, device=device)))


def require_agreement(name: str, value: object) -> None:
    """Raises ConfigError, on every rank, where ranks have different values of what they must share.

    Args:
        name: what it is, for the error message.
        value: this rank's value, anything that can be compared; of mappings only the entries that differ are
            named.
    """
    values = gather_over_ranks(value)
    if all(other == values[0] for other in values):
        return
    if all(isinstance(other, dict) for other in values):
        keys = [key for key in dict.fromkeys(chain(*values)) if len({repr(v.get(key)) for v in values}) > 1]
        values = [{key: v.get(key) for key in keys} for v in values]
    shown = "; ".join(f"rank {number}: {other!r}" for number, other in enumerate(values))
    raise ConfigError(
        f"{name} must be the same on all ranks, but is {shown}; start every rank with the same command, "
        "configs, data and version of drift"
    )


def share_of_rank(num: int, key: str) -> range:
    """The indices of this rank's share of `num` things, the same number on every rank.

    Args:
        num: things in all.
        key: the setting that says how many, for the error message.

    Raises:
        ConfigError: where they cannot be shared evenly.
    """
    if num % world_size():
        raise ConfigError(f"{key} is {num}: it must be a multiple of the {world_size()} ranks")
    size = num // world_size()
    return range(rank() * size, (rank() + 1) * size)


def shard(
    model: nn.Module, units: Sequence[Sequence[nn.Module]], mesh: DeviceMesh, dtype: torch.dtype | None
) -> None:
    """Splits a model's parameters over the ranks, row by row (FSDP2), in place.

    Gradients are reduced in float32. Everything that reads a weight must run in the `forward` of the model or
    of the module that owns it: there it is whole.

    Args:
        model: on any device; parameters that need no gradient are split, too.
        units: its submodules that are gathered together, and released again after their forward pass; what is
            left makes one more.
        mesh: all ranks, in one dimension.
        dtype: what passes compute in, the parameters that they gather and their gradients; None: as stored.
    """
    # Inputs are left alone: rotary tables are float32 and draws float64 for a reason.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(list(unit), mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which each rank holds a sharded model whole: passes through it don't communicate.

    Args:
        model: what `shard` has split; it is gathered at the start, once, and released at the end.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert isinstance(model, FSDPModule)
    try:
        for part in parts:
            part.unshard()
        model.set_reshard_after_forward(False)
        yield
    finally:
        model.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()


@contextmanager
def joined(model: nn.Module, spare_pass: Callable[[], object], device: torch.device) -> Iterator[None]:
    """A context in which ranks may make different numbers of passes through a sharded model.

    Each pass gathers the weights, which takes all ranks: those that are through make spare passes until the
    last one is.

    Args:
        model: what `shard` has split.
        spare_pass: a pass that gathers what every other one does, in the same order.
        device: where the ranks communicate.
    """

    def announce(*_: object) -> None:
        # What those who are through ask below; nobody here waits for the answer, which is yes.
        highest_over_ranks(torch.tensor(1, device=device))

    # Before the gathering of the model's own hook, so that all ranks communicate in one order.
    handle = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while max_over_ranks(0, device):
        spare_pass()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split over the ranks, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A tensor split over the ranks as a parameter of its shape is; each rank keeps a copy of its rows.

    Args:
        parameter: may be whole, and then the value stays so.
        value: the same on every rank.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    assert parameter.placements == (Shard(0),)
    num_rows = -(-len(value) // world_size())
    rows = value[rank() * num_rows : (rank() + 1) * num_rows].to(parameter.device, copy=True)
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has split a model."""
    return isinstance(model, FSDPModule)


def on_first_rank(state: dict[str, Any]) -> dict[str, Any]:
    """What a state holds, with whole tensors on the CPU: on rank 0 alone, nothing on the others.

    Args:
        state: dictionaries and lists of anything; split tensors in it are gathered one by one.
    """
    first = rank() == 0

    def gather(tensor: DTensor) -> Tensor | None:
        found = tensor.full_tensor()
        return found.cpu() if first else None

    found = apply_to_collection(state, DTensor, gather)
    return found if first else {}


class Collectives(TorchDispatchMode):
    """A context that counts what this rank says to the others, by the names of the operations.

    Args:
        counts: to go on with; None: from nothing.
    """

    def __init__(self, counts: Counter[str] | None = None) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter() if counts is None else counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
