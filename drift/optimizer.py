"""The optimizer of policies: AdamW that decays matrices only, with a learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from drift.averaging import keep_average
from drift.contract import ConfigError, require
from drift.distributed import whole

Schedule = Literal["constant", "linear", "cosine"]
# Of a weight of 0.02, bfloat16 keeps steps of about 1e-4.
LEAST_BFLOAT16_LR = 1e-4
_NO_MASTERS = (
    "model.optimizer.master_weights is True: the weights to be trained are float32 already (adapters always "
    "are); set it to false, or model.dtype to bfloat16 without model.lora"
)


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101) and its schedule.

    Args:
        lr: highest learning rate, > 0.
        betas: decay of the two moments, each in [0, 1).
        weight_decay: of matrices; norms and biases are never decayed.
        gradient_clip: largest norm of the whole gradient, > 0; inf: no clipping.
        warmup_steps: optimizer steps in which the learning rate grows from 0.
        schedule: what follows until the last step: `constant`, or `linear` or `cosine` down to 0.
        master_weights: of bfloat16 weights, keep a float32 copy that the updates are added to: 12 bytes of
            optimizer state a parameter instead of 4, and no small update is lost. Gradients stay bfloat16.
        ema_decay: decay of an exponential moving average (EMA) of the weights, in [0, 1); 0: none is kept.
            Validation, checkpoints and exports have the average; rollouts and updates have the weights
            themselves. It takes 4 bytes a parameter.
        max_skipped: steps in a row that are skipped where the loss or the gradient is not finite, >= 0; the
            next such step stops training with its batch saved. A skipped step counts as a step, so that the
            prompts go on, but leaves weights, optimizer and schedule as they are.

    Raises:
        ConfigError: where a value is outside its range.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    master_weights: bool = False
    ema_decay: float = 0.0
    max_skipped: int = 0

    def __post_init__(self) -> None:
        require(self, math.isfinite(self.lr) and self.lr > 0, "lr", "set it to a positive number")
        require(self, all(0 <= beta < 1 for beta in self.betas), "betas", "set both in [0, 1)")
        require(self, 0 <= self.weight_decay < math.inf, "weight_decay", "set it to 0 or more")
        require(
            self,
            self.gradient_clip > 0,
            "gradient_clip",
            "set it to a positive norm, or .inf for no clipping",
        )
        require(self, self.warmup_steps >= 0, "warmup_steps", "set it to 0 or more optimizer steps")
        require(self, 0 <= self.ema_decay < 1, "ema_decay", "set it in [0, 1), such as 0.98")
        require(self, self.max_skipped >= 0, "max_skipped", "set it to 0 or more steps in a row")
        require(
            self, self.schedule in get_args(Schedule), "schedule", f"choose one of {list(get_args(Schedule))}"
        )


class MasterAdamW(torch.optim.AdamW):
    """AdamW over low-precision parameters: it updates float32 copies and writes them back, rounded.

    The copy (`master`) and the moments are state of the parameter, float32 and shaped and sharded as it is.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; gives back what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # One by one: a float32 gradient exists of one parameter at a time.
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            state["master"] = parameter.detach().to(torch.float32, copy=True)
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        adamw(
            [state["master"]],
            [gradient.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        parameter.copy_(state["master"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, float32 bit by bit."""
        # torch would round every state to the parameter's dtype: it is given the step counts alone.
        saved = state_dict["state"]
        counts = {number: {"step": state["step"]} for number, state in saved.items()}
        super().load_state_dict({**state_dict, "state": counts})
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in saved.get(number, {}).items():
                if name != "step":
                    self.state[parameter][name] = value.to(parameter.device, torch.float32)


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those of one dimension (norms, biases) are not decayed.

    Raises:
        ConfigError: where master weights are asked for of float32 parameters.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if config.master_weights and any(p.dtype == torch.float32 for p in trainable):
        raise ConfigError(_NO_MASTERS)
    groups = [
        {"params": [p for p in trainable if _is_decayed(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if not _is_decayed(p)], "weight_decay": 0.0},
    ]
    family = MasterAdamW if config.master_weights else torch.optim.AdamW
    optimizer = family([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
    if config.ema_decay:
        keep_average(optimizer, config.ema_decay)
    return optimizer


def _is_decayed(parameter: Tensor) -> bool:
    return parameter.dim() >= 2


def require_precise(config: OptimizerConfig, dtype: torch.dtype) -> None:
    """Checks that updates of this size survive in weights of this dtype, before there are any.

    Warns where bfloat16 weights would lose most updates.

    Args:
        config: settings of the optimizer.
        dtype: of the weights that are to be trained.

    Raises:
        ConfigError: where master weights are asked for of float32 weights, or an average of bfloat16 ones.
    """
    if config.master_weights and dtype == torch.float32:
        raise ConfigError(_NO_MASTERS)
    if config.ema_decay and dtype != torch.float32 and not config.master_weights:
        raise ConfigError(
            f"model.optimizer.ema_decay is {config.ema_decay} and the weights are bfloat16: what a "
            "step adds to an average would be rounded away; set model.optimizer.master_weights to true"
        )
    if dtype == torch.bfloat16 and not config.master_weights and config.lr < LEAST_BFLOAT16_LR:
        rank_zero_warn(
            f"model.optimizer.lr is {config.lr} and the weights are bfloat16: an update below 1/256 of a "
            "weight is rounded away; set model.optimizer.master_weights to true, or model.dtype to float32 "
            "and trainer.precision to bf16-mixed"
        )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_steps: int) -> LRScheduler:
    """The learning rate over `num_steps` optimizer steps, to be stepped after each."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps)


def apply_settings(optimizer: torch.optim.Optimizer, schedule: LRScheduler, config: OptimizerConfig) -> None:
    """Gives an optimizer and its schedule these settings, where a checkpoint left those of an earlier start.

    Says so where the learning rate changes.
    """
    assert isinstance(schedule, LambdaLR)
    before = schedule.base_lrs[0]
    if before != config.lr:
        rank_zero_info(f"model.optimizer.lr: going on with {config.lr:g}; the checkpoint's was {before:g}")
    schedule.base_lrs = [config.lr for _ in optimizer.param_groups]
    rates: list[float | Tensor] = [config.lr * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group |= {
            "lr": rate,
            "initial_lr": config.lr,
            "betas": config.betas,
            "weight_decay": config.weight_decay if _is_decayed(group["params"][0]) else 0.0,
        }


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients down to `max_norm` where they are larger; gives back the norm they had, [].

    Of sharded parameters it is that of all shards together.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # torch's norm of nothing is on the CPU, whatever ranks talk by
        return torch.zeros((), device=parameters[0].device)
    norm = nn.utils.get_total_norm(gradients)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return whole(norm)
