"""The optimizer of policies: AdamW that decays matrices only, with a learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from drift.contract import require

Schedule = Literal["constant", "linear", "cosine"]


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

    Raises:
        ConfigError: where a value is outside its range.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    warmup_steps: int = 0
    schedule: Schedule = "constant"

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
        require(
            self, self.schedule in get_args(Schedule), "schedule", f"choose one of {list(get_args(Schedule))}"
        )


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those of one dimension (norms, biases) are not decayed."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_steps: int) -> LRScheduler:
    """The learning rate over `num_steps` optimizer steps, to be stepped after each."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients down to `max_norm` where they are larger; gives back the norm they had, []."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)
