"""FSDP2 as a Lightning strategy: each rank holds a part of the policy, its optimizer and the reference."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from torch import Tensor

from drift.contract import ConfigError
from drift.distributed import on_first_rank, split_like
from drift.storage import AtomicCheckpointIO


class _MappedCheckpointIO(AtomicCheckpointIO):
    """Reads checkpoints out of the pages of their file, which the ranks of a machine share."""

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint; its tensors are views of the file."""
        return torch.load(path, map_location=map_location, mmap=True, weights_only=True)


class ShardedStrategy(ModelParallelStrategy):
    """Splits the policy over all ranks of all machines; `drift.policy_module` says at which modules.

    A checkpoint is one file with whole tensors, as a single process writes it: it goes on under any strategy
    and on any number of ranks.

    Args:
        process_group_backend: how ranks communicate; None: nccl on GPUs, gloo on CPUs.
        timeout: after which a rank gives up waiting for the others.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        self.checkpoint_io = _MappedCheckpointIO()

    def setup_environment(self) -> None:
        """Starts the ranks' communication, all of them in one dimension."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for the optimizer's state to be loaded, as it does without sharding."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights, whole and on the CPU, on rank 0; nothing on the others."""
        assert self.lightning_module is not None
        return on_first_rank(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state, whole and on the CPU, on rank 0; nothing on the others."""
        return on_first_rank(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What the checkpoint plugin reads: it is checked before anything is made of it."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives each rank its rows of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {
            name: split_like(own[name], value) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each rank its rows of the optimizer's state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # The places of a parameter in its groups are what files and optimizers share.
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            owners = dict(zip(numbers, parameters, strict=True))
            split = {
                number: {
                    name: split_like(owners[number], value)
                    if isinstance(value, Tensor) and value.shape == owners[number].shape
                    else value
                    for name, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": split})


def require_strategy(strategy: Strategy) -> None:
    """Raises ConfigError where the strategy would shard the policy in a way of its own."""
    other = isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)
    if other and not isinstance(strategy, ShardedStrategy):
        raise ConfigError(
            f"trainer.strategy is {type(strategy).__name__}: it cannot shard this policy; use auto, ddp or "
            "--config strategy/fsdp"
        )
