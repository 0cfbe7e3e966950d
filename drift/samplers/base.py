"""What a timestep sampler is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from drift.contract import ConfigError, Rollout, TimestepPlan
from drift.randomness import draw_keys, fold, uniform


class TimestepSampler(ABC):
    """Chooses the noisy states that the policy gradient is estimated from: one class an estimator."""

    # Whether its plans replay timesteps: draws of commits have a likelihood only where they were made.
    replays: bool = True

    @abstractmethod
    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """The noisy states to learn from.

        Args:
            rollout: N rollouts with their denoising feedback.
            generator: source of the draws. None: they are keyed by `rollout.seeds`, so that a row's plan does
                not depend on its neighbours; without seeds torch's default generator is used.
        """


def draws(rollout: Rollout, num: int, generator: torch.Generator | None) -> Tensor:
    """[N,num] float64 draws in (0,1), independent of each other.

    Args:
        rollout: gives the rows and, without a generator, their keys.
        num: draws a row.
        generator: see `TimestepSampler.plan`.
    """
    device = rollout.step_map.device
    if generator is None and rollout.seeds is not None:
        keys = rollout.seeds.to(device)
    else:
        keys = draw_keys(rollout.step_map.shape[0], generator, device)
    return uniform(fold(keys[:, None], torch.arange(num, device=device)))


def candidates(rollout: Rollout) -> Tensor:
    """[N,S] bool, the timesteps that committed at least one valid token; S covers the batch's last."""
    num_timesteps = int(rollout.step_map.max()) + 1
    found = torch.zeros(
        rollout.step_map.shape[0], num_timesteps, dtype=torch.int64, device=rollout.step_map.device
    )
    return found.scatter_add(1, rollout.step_map, rollout.completion_mask.long()) > 0


def sequential_plan(rollout: Rollout, timesteps: Tensor, weight: Tensor) -> TimestepPlan:
    """The plan whose noisy states are exactly what the policy saw at the chosen timesteps.

    Args:
        rollout: N rollouts.
        timesteps: [K,N] int64.
        weight: [K,N] float32, 0 where the row has no such timestep.
    """
    real = (weight > 0)[:, :, None]
    return TimestepPlan(
        masked=(rollout.step_map >= timesteps[:, :, None]) & real,
        current=(rollout.step_map == timesteps[:, :, None]) & real,
        weight=weight,
        replay=True,
        num_timesteps=candidates(rollout).sum(dim=1),
    )


def require_token_probs(rollout: Rollout) -> Tensor:
    """[N,C] the probabilities that the rollout recorded.

    Raises:
        ConfigError: where the rollout, or one of its rows, recorded none.
    """
    valid = rollout.completion_mask
    # One token's probability may have underflowed to 0; a whole row's were never recorded.
    if rollout.token_probs is None or bool(
        (valid.any(dim=1) & ~(valid & (rollout.token_probs > 0)).any(dim=1)).any()
    ):
        raise ConfigError(
            "token_probs is missing, or 0 at all valid tokens of a row: a sampler that goes by how sure the "
            "policy was needs the probabilities that the rollout recorded; use UniformSampler without them"
        )
    return rollout.token_probs


def require_positive(key: str, value: float) -> None:
    """Raises ConfigError unless a number of timesteps is 1 or more."""
    if value < 1:
        raise ConfigError(f"{key} is {value!r}: set it to 1 or more timesteps")
