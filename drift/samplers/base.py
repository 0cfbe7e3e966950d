"""What a timestep sampler is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from drift.contract import CERTAIN, ConfigError, Rollout, TimestepPlan
from drift.loss_config import LossConfig
from drift.randomness import draw_keys, fold, uniform


class TimestepSampler(ABC):
    """Chooses the noisy states that the policy gradient is estimated from: one class an estimator."""

    # Whether its plans replay timesteps: draws of commits have a likelihood only where they were made.
    replays: bool = True
    # Whether its weights differ, which the loss normalisation `token` would take for numbers of tokens.
    weighs: bool = False
    # Whether rows have as many states as timesteps, so that the last of the plan are those of a few rows.
    ragged: bool = False
    # Noisy states of a row's plan, at most, for `drift plan`; None: any number.
    max_states: int | None = None

    def require_fits(self, loss: LossConfig, *, draws: bool | None = None) -> None:
        """Raises ConfigError where loss, plans and rollouts don't fit each other.

        Args:
            loss: settings.
            draws: whether rollouts draw which positions commit; None: that is not known yet.
        """
        name, commits = type(self).__name__, loss.commit_weight > 0
        if self.weighs and loss.normalisation == "token":
            raise ConfigError(
                f"model.loss.normalisation is 'token': {name} weighs its timesteps so that their sum is "
                "unbiased, and numbers of tokens know nothing of that; set it to sample or trajectory"
            )
        if self.ragged and loss.normalisation == "token" and draws is None:
            rank_zero_warn(
                f"model.loss.normalisation is 'token', by which the few rows that have a last timestep count "
                f"as much as all that have a first: {name} is exact with sample or trajectory only"
            )
        if loss.importance_cap is not None and not self.replays:
            raise ConfigError(
                f"model.loss.importance_cap is {loss.importance_cap}: of the noisy states of {name} the "
                "rollout has no probabilities; take a sampler of its own timesteps, or set it to null"
            )
        if draws and commits and not self.replays:
            raise ConfigError(
                f"model.sampler is {name}: its noisy states are not those at which rollout.decode.commit: "
                "stochastic draws, so that draws have no likelihood; use a sampler of the rollout's own "
                "timesteps (Weighted, Full, ...), or model.loss.commit_weight: 0"
            )
        if draws is not None and not (draws and commits) and loss.token_weight == 0:
            raise ConfigError(
                "model.loss.token_weight is 0: there is nothing to learn from but draws of commits; set "
                "rollout.decode.commit to stochastic and model.loss.commit_weight above 0, or raise it"
            )

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
    """[N,S] bool, timesteps that committed a valid token, or anything by a draw; S: the batch's last + 1."""
    num_timesteps = int(rollout.step_map.max()) + 1
    found = torch.zeros(
        rollout.step_map.shape[0], num_timesteps, dtype=torch.int64, device=rollout.step_map.device
    )
    took_part = rollout.completion_mask
    if rollout.commit_kind is not None:
        took_part = took_part | (rollout.commit_kind != CERTAIN)
    return found.scatter_add(1, rollout.step_map, took_part.long()) > 0


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
