"""What every LightningModule of drift shares: it owns a policy and measures its answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn

from drift.checkpoints import (
    require_adapters_of,
    require_resumable,
    require_same_command,
    require_weights_of,
)
from drift.contract import ConfigError, PromptBatch
from drift.distributed import failing_together, gathered, joined, shard
from drift.heartbeat import Stage
from drift.models import (
    DiffusionLM,
    LoRAConfig,
    add_adapters,
    fingerprint,
    load_policy,
    policy_skeleton,
    read_config,
    require_adapters,
    require_matching_tokenizer,
    resolve_folder,
)
from drift.optimized_module import OptimizedModule
from drift.optimizer import OptimizerConfig, require_precise
from drift.signals import Stopped
from drift.strategy import require_strategy

DType = Literal["float32", "bfloat16"]
_ADAPTERS, _COMMAND = "adapters", "command"
Experience = Callable[["PolicyModule", PromptBatch, int], PromptBatch]


class PolicyModule(OptimizedModule):
    """Owns the policy, and evaluates the rollouts that the rollout callback attaches to every batch.

    Args:
        policy: a Hugging Face folder, the bare name of a policy that comes with drift, or a hub id.
        optimizer: settings of AdamW.
        dtype: dtype of the policy's parameters.
        random_init: start from fresh weights, of the folder's config.json.
        lora: adapters to train in place of the weights, which stay as they are; None: train the weights.
        activation_checkpointing: compute the blocks again in backward: less memory, the same numbers, slower.
        gather_for_rollout: of a sharded policy, hold all weights on every rank for a rollout or evaluation,
            gathered once; False: gather them in every pass, block by block: less memory, slower.
    """

    command = ""  # that trains it
    experience: Experience | None = None
    on_progress: Callable[[str, int, int], None] | None = None
    may_be_finished = False  # whether a checkpoint with nothing left to do is no mistake
    # Where training may stop: between two steps and after a rollout or validation, where all ranks meet, and
    # between two passes of a stage, on this rank.
    between_steps: Callable[[], None] | None = None
    meet: Callable[[], None] | None = None
    between_passes: Callable[[str], None] | None = None

    def __init__(
        self,
        policy: str,
        optimizer: OptimizerConfig,
        dtype: DType = "float32",
        random_init: bool = False,
        lora: LoRAConfig | None = None,
        activation_checkpointing: bool = False,
        gather_for_rollout: bool = True,
    ) -> None:
        super().__init__(optimizer)
        if dtype not in get_args(DType):
            raise ConfigError(f"model.dtype is {dtype!r}: choose one of {list(get_args(DType))}")
        self.policy_folder = resolve_folder(policy)
        self.policy_config = read_config(self.policy_folder)
        self.policy_dtype: torch.dtype = getattr(torch, dtype)
        self.random_init = random_init
        self.lora = lora
        self._base = ""  # of which weights the adapters are
        if lora is not None:
            if random_init:
                raise ConfigError(
                    "model.random_init is True: the weights under the adapters of model.lora would be in no "
                    "folder and no checkpoint; set one of the two to its default"
                )
            # Every target by its name: what "all of them" are, a checkpoint must be able to say.
            self.lora = replace(lora, targets=require_adapters(policy_skeleton(self.policy_folder), lora))
            # A checkpoint holds the adapters alone; `require_weights_of` sees that it holds all of them.
            self.strict_loading = False
        self.activation_checkpointing = activation_checkpointing
        self.gather_for_rollout = gather_for_rollout
        self._own_pace = False
        self.stage = Stage("setup", 0, 1, time.monotonic())
        self.policy: DiffusionLM

    def setup(self, stage: str) -> None:
        """Checks precision, and that the tokenizer is the policy's, before its weights are loaded."""
        require_strategy(self.trainer.strategy)
        if self.trainer.precision in ("16-mixed", "16-true"):
            raise ConfigError(
                f"trainer.precision is {self.trainer.precision!r}: gradients would be clipped while they are "
                "scaled; use bf16-mixed or 32-true"
            )
        if self.trainer.precision == "bf16-true":
            raise ConfigError(
                "trainer.precision is 'bf16-true': it would round whatever is float32, as probabilities, "
                "counts and adapters; set model.dtype to bfloat16, and trainer.precision to 32-true"
            )
        if stage == "fit":
            trained = torch.float32 if self.lora is not None else self.policy_dtype
            require_precise(self.optimizer_config, trained)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            require_matching_tokenizer(self.policy_config, tokenizer)

    @property
    def precision_settings(self) -> dict[str, str]:
        """What the policy computes in."""
        return {"dtype": str(self.policy_dtype).removeprefix("torch."), "precision": self.trainer.precision}

    def configure_model(self) -> None:
        """Loads the policy, once."""
        if "policy" not in self._modules:
            policy = self._loaded(self.policy_folder, "model.policy")
            policy.activation_checkpointing = self.activation_checkpointing
            if self.lora is not None:
                self._base = fingerprint(policy)
                # The run's seed itself: whatever has been drawn since must not matter.
                add_adapters(policy, self.lora, seed=torch.initial_seed())
            self.policy = self._sharded(policy)

    def _loaded(self, folder: Path, key: str) -> DiffusionLM:
        copy, fresh = self.device_mesh is None, self.random_init
        return load_policy(folder, self.policy_dtype, random_init=fresh, copy=copy, key=key)

    def _sharded(self, policy: DiffusionLM) -> DiffusionLM:
        """The policy, split over the ranks where the strategy does that."""
        if self.device_mesh is not None:
            half = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            shard(policy, policy.units, self.device_mesh["data_parallel"], half)
        return policy

    def on_after_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> PromptBatch:
        """The batch with its rollout, which the rollout callback provides.

        In training the last step is over, its metrics are logged and the next has not begun.
        """
        if self.trainer.training and self.between_steps is not None:
            self.between_steps()
        if self.experience is None or not self.needs_rollout(batch):
            return batch
        return self.experience(self, batch, dataloader_idx)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A stretch of a training step that each rank does by itself; all of them meet at its end.

        There the SampleError of one is raised on all, and all stop where one was asked to: it may have broken
        its stretch off.
        """
        with failing_together(), suppress(Stopped):
            yield
        if self.meet is not None:
            self.meet()

    @property
    def goes_alone(self) -> bool:
        """Whether this rank can break off a rollout or an evaluation while the others go on with theirs."""
        return self.device_mesh is None or self.gather_for_rollout

    def needs_rollout(self, batch: PromptBatch) -> bool:
        """Whether the batch is to be rolled out."""
        return not self.trainer.training

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weights for a checkpoint: with adapters these alone, as the rest is in the policy's folder."""
        state = super().state_dict(*args, **kwargs)
        if self.lora is not None:
            prefix = kwargs.get("prefix", "")
            for name, parameter in self.named_parameters(prefix.rstrip("."), remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)
        return state

    @property
    def _adapters(self) -> dict[str, Any] | None:
        return None if self.lora is None else {**asdict(self.lora), "weights": self._base}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the command that trains, and what the adapters are, where there are any."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_COMMAND] = self.command
        if self.lora is not None:
            checkpoint[_ADAPTERS] = self._adapters

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights that are not the policy's, and a run that has nothing left to do."""
        require_adapters_of(checkpoint.get(_ADAPTERS), self._adapters)
        require_weights_of(self, checkpoint)
        if self.trainer.state.fn == TrainerFn.FITTING:
            masters = self.optimizer_config.master_weights
            num_steps = math.inf if self.may_be_finished else self.trainer.max_steps
            require_same_command(checkpoint.get(_COMMAND, self.command), self.command)
            require_resumable(checkpoint, num_steps, masters)
        super().on_load_checkpoint(checkpoint)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The context of a rollout: no graph, evaluation mode, the trainer's precision."""
        was_training = self.policy.training
        self.policy.eval()
        try:
            # no_grad, not inference_mode: what a rollout returns takes part in training.
            with torch.no_grad(), self.trainer.precision_plugin.forward_context(), self.at_own_pace():
                yield
        finally:
            self.policy.train(was_training)

    @contextmanager
    def at_own_pace(self) -> Iterator[None]:
        """A context in which each rank makes as many passes without a gradient as it needs.

        All ranks must enter and leave it together; within itself it does nothing.
        """
        if self.device_mesh is None or self._own_pace:
            yield
            return
        ranks = gathered(self.policy)
        if not self.gather_for_rollout:
            ranks = joined(self.policy, self._spare_pass, self.device)
        self._own_pace = True
        try:
            with torch.no_grad(), ranks:
                yield
        finally:
            self._own_pace = False

    def _spare_pass(self) -> None:
        token = torch.full((1, 1), self.policy.mask_token_id, device=self.device)
        self.policy.head(self.policy(token))

    def report(self, stage: str, done: int, total: int) -> None:
        """Tells the progress bar, where there is one, and other ranks how far a stage of this step is.

        Where a signal has asked for it, this stops training.
        """
        self.stage = Stage(stage, done, total, time.monotonic())
        if self.between_passes is not None:
            self.between_passes(stage)
        if self.on_progress is not None:
            self.on_progress(stage, done, total)
