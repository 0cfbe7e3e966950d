"""The settings of a run that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from drift.contract import ConfigError
from drift.plan.sizes import PolicySizes
from drift.rollout import DenoiseConfig

_PRECISIONS = {"32": "32-true", "None": "32-true", "bf16": "bf16-mixed"}
# Strategies under which every rank holds a part of the policy; under all others it holds the whole.
_SHARDING = "ShardedStrategy"
_UNPLANNED = ("deepspeed", "offload", "xla", "fsdp", "model_parallel", "modelparallel")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What the memory of a run depends on, under the names of the settings it comes from.

    Args:
        policy: sizes of model.policy.
        reference: sizes of model.reference; None: the policy as it was at the start.
        beta: model.loss.beta; a reference exists only where it is > 0.
        entropy_coeff: model.loss.entropy_coeff; entropies are computed only where it is not 0.
        dtype: model.dtype, `float32` or `bfloat16`.
        precision: trainer.precision: `32-true` or `bf16-mixed`.
        master_weights: model.optimizer.master_weights.
        average: whether model.optimizer.ema_decay is > 0.
        activation_checkpointing: model.activation_checkpointing.
        lora_rank: model.lora.rank; None: no adapters, all weights are trained.
        lora_targets: model.lora.targets.
        num_updates: model.num_updates.
        micro_batch_size: model.micro_batch_size, noisy states.
        micro_batch_tokens: model.micro_batch_tokens, positions; None: any number.
        states_per_row: noisy states that the sampler takes of a completion, at most; None: any number.
        train_groups: model.train_groups, over all ranks; None: all.
        max_prompt_length: data.max_prompt_length, tokens.
        prompts_per_step: data.prompts_per_step, over all ranks.
        evaluation_batch_size: data.evaluation_batch_size, rows on each rank.
        group_size: rollout.group_size.
        completion_length: rollout.completion_length, positions.
        evaluation_length: rollout.evaluation_length; None: as in training.
        rollout_batch_size: rollout.batch_size, rows; None: all.
        decode: rollout.decode.
        evaluation: rollout.evaluation.
        strategy: trainer.strategy, its name or its class path.
        num_gpus: ranks in all, one GPU each.
        gather_for_rollout: model.gather_for_rollout; matters where the policy is sharded.

    Raises:
        ConfigError: where a value is outside its range, or a run with it would be refused.
    """

    policy: PolicySizes
    reference: PolicySizes | None = None
    beta: float = 0.0
    entropy_coeff: float = 0.0
    dtype: str = "float32"
    precision: str = "32-true"
    master_weights: bool = False
    average: bool = False
    activation_checkpointing: bool = False
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] | None = None
    num_updates: int = 1
    micro_batch_size: int = 64
    micro_batch_tokens: int | None = None
    states_per_row: int | None = None
    train_groups: int | None = None
    max_prompt_length: int = 1024
    prompts_per_step: int = 8
    evaluation_batch_size: int = 64
    group_size: int = 4
    completion_length: int = 256
    evaluation_length: int | None = None
    rollout_batch_size: int | None = None
    decode: DenoiseConfig = DenoiseConfig(temperature=1.0)  # noqa: RUF009 - frozen
    evaluation: DenoiseConfig = DenoiseConfig()  # noqa: RUF009 - frozen
    strategy: str = "auto"
    num_gpus: int = 1
    gather_for_rollout: bool = True

    def __post_init__(self) -> None:
        for key, value in (
            ("model.num_updates", self.num_updates),
            ("model.micro_batch_size", self.micro_batch_size),
            ("model.micro_batch_tokens", self.micro_batch_tokens),
            ("model.lora.rank", self.lora_rank),
            ("data.max_prompt_length", self.max_prompt_length),
            ("data.prompts_per_step", self.prompts_per_step),
            ("data.evaluation_batch_size", self.evaluation_batch_size),
            ("rollout.batch_size", self.rollout_batch_size),
            ("num_gpus", self.num_gpus),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{key} is {value}: set it to 1 or more")
        if self.group_size < 2:
            raise ConfigError(f"rollout.group_size is {self.group_size}: set it to 2 or more")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"model.dtype is {self.dtype!r}: choose one of ['float32', 'bfloat16']")
        object.__setattr__(self, "precision", _PRECISIONS.get(self.precision, self.precision))
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(
                f"trainer.precision is {self.precision!r}: its memory is not planned; "
                "choose one of ['32-true', 'bf16-mixed']"
            )
        if self.master_weights and self.trained_bytes == 4:
            raise ConfigError(
                "model.optimizer.master_weights is True: the weights to be trained are float32 already "
                "(adapters always are); set it to false, or model.dtype to bfloat16 without model.lora"
            )
        if any(word in self.strategy.lower() for word in _UNPLANNED):
            raise ConfigError(
                f"trainer.strategy is {self.strategy!r}: its memory is not planned; choose auto, ddp or "
                "--config strategy/fsdp"
            )
        if self.prompts_per_step % self.num_gpus:
            raise ConfigError(
                f"data.prompts_per_step is {self.prompts_per_step}: it must be a multiple of the "
                f"{self.num_gpus} GPUs of num_gpus"
            )
        unknown = set(self.lora_targets or ()) - {name for name, _, _ in self.policy.linears}
        if unknown:
            known = sorted({name for name, _, _ in self.policy.linears})
            raise ConfigError(
                f"model.lora.targets is {list(self.lora_targets or ())}: the policy's blocks have no linear "
                f"layer {min(unknown)!r}; choose among {known}"
            )
        self.decode.require_fits(self.completion_length)
        self.evaluation.require_fits(self.evaluation_length or self.completion_length)

    @cached_property
    def num_states(self) -> int:
        """Noisy states of a micro-batch, of prompts of the greatest length; no more than there are."""
        tokens = self.micro_batch_tokens
        fit = self.micro_batch_size if tokens is None else max(tokens // self.length, 1)
        if self.states_per_row is None:
            return min(self.micro_batch_size, fit)
        groups = self.train_groups or self.prompts_per_step
        there = -(-groups // self.num_gpus) * self.group_size * self.states_per_row
        return min(self.micro_batch_size, fit, there)

    @cached_property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the weights only."""
        return self.num_gpus > 1 and self.strategy.endswith(_SHARDING)

    @cached_property
    def kept_reference(self) -> PolicySizes | None:
        """The second copy of weights that the KL needs; None: none, since adapters can be switched off."""
        if self.beta == 0:
            return None
        return self.reference or (self.policy if self.lora_rank is None else None)

    @cached_property
    def rows_decoded(self) -> int:
        """Rows that a rank decodes at once at most, in training or evaluation."""
        training = self.prompts_per_step // self.num_gpus * self.group_size
        rows = max(training, self.evaluation_batch_size)
        return min(rows, self.rollout_batch_size or rows)

    @cached_property
    def autocast(self) -> bool:
        """Whether forward passes compute in bfloat16 from weights that are stored as they are."""
        return self.precision == "bf16-mixed"

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of one of the weights of policy and reference."""
        return 2 if self.dtype == "bfloat16" else 4

    @cached_property
    def gathered_bytes(self) -> int:
        """Bytes of one of the policy's weights where it is gathered for a pass: in what the pass computes."""
        return min(self.weight_bytes, self.compute_bytes)

    @cached_property
    def trained_bytes(self) -> int:
        """Bytes of one trained weight: adapters are float32 whatever the policy is."""
        return self.weight_bytes if self.lora_rank is None else 4

    @cached_property
    def compute_bytes(self) -> int:
        """Bytes of a number that a linear layer gives."""
        return 2 if self.autocast else self.weight_bytes

    @cached_property
    def length(self) -> int:
        """Positions of a noisy state at worst; longer ones are refused when they come."""
        return min(self.max_prompt_length + self.completion_length, self.policy.max_length)
