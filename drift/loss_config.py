"""Settings of the policy loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from drift.contract import require

KL = Literal["k1", "k2", "k3"]
Normalisation = Literal["token", "sample", "trajectory"]


@dataclass(frozen=True)
class LossConfig:
    """Settings of the policy loss.

    Args:
        tau: clipped clean state: a token not committed at the noisy state's own timestep counts only where
            its probability is at least tau, in [0, 1]; 0 keeps all. None: only those that were committed at
            it count, and no other is scored: the likelihood of what the policy did.
        beta: weight of the KL to the reference; 0: no reference is loaded.
        kl: estimator of the KL, k1, k2 or k3 (Schulman, "Approximating KL divergence", 2020).
        eps_low: PPO clip below 1 - eps_low; several updates per rollout only.
        eps_high: PPO clip above 1 + eps_high.
        entropy_coeff: weight of |H_ref - H| (of H without a reference).
        normalisation: rows without a gradient (no advantage, beta and entropy_coeff 0) are left out of all
            counts; `token` divides by the kept tokens of the whole batch, `sample` by those of
            each row, then by rows; `trajectory` sums a row's kept tokens over all its timesteps, as the plan
            estimates that sum, and divides by rows: with tau null the policy gradient itself, up to the
            number of rows that have a gradient, at temperature 1, where answers hold no padding and draws, or
            a fixed schedule by the likeliest token, choose the positions. Rows are those with noisy states.
            Estimators of whole completions (ESPO, GDPO, SPG) have a reduction of their own, and no tau.
        importance_cap: the policy-gradient term of a token committed at the noisy state's own timestep is
            multiplied by min(update's probability / rollout's probability, importance_cap), both of the
            weights that made the rollout, >= 1, such as 2.0: against cached or low-precision rollouts, whose
            probabilities differ from those of the update. None: no weights.
        token_weight: weight of the tokens' likelihood in the policy-gradient term, >= 0; 0 for rollouts at
            temperature 0, whose tokens are no choice.
        negative_weight: factor of the tokens' policy-gradient term where the advantage is below 0, >= 0; 0
            learns tokens from what did better than its group alone. Commits are learned from both.
        commit_weight: weight of the likelihood of commits that draws decided (decode.commit: stochastic),
            >= 0; 1 is the policy gradient of what was sampled. Draws that committed give log q, positions of
            the block that they left masked log(1 - q), under the same normalisation as the tokens of their
            noisy state. Without such draws there is no such term.

    Raises:
        ConfigError: where a value is outside its range.
    """

    tau: float | None = 0.6
    beta: float = 0.0
    kl: KL = "k3"
    eps_low: float = 0.2
    eps_high: float = 0.2
    entropy_coeff: float = 0.0
    normalisation: Normalisation = "token"
    importance_cap: float | None = None
    token_weight: float = 1.0
    negative_weight: float = 1.0
    commit_weight: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            self.tau is None or 0 <= self.tau <= 1,
            "tau",
            "set it to a probability in [0, 1], or null for the tokens committed at the timestep alone",
        )
        for key in ("token_weight", "negative_weight", "commit_weight"):
            value = getattr(self, key)
            require(self, math.isfinite(value) and value >= 0, key, "set it to 0 or a positive number")
        require(
            self,
            math.isfinite(self.beta) and self.beta >= 0,
            "beta",
            "set it to 0 (no reference) or a positive number",
        )
        require(self, self.kl in get_args(KL), "kl", f"choose one of {list(get_args(KL))}")
        require(self, 0 <= self.eps_low < 1, "eps_low", "set it in [0, 1)")
        require(self, self.eps_high >= 0, "eps_high", "set it to 0 or more")
        require(self, math.isfinite(self.entropy_coeff), "entropy_coeff", "set it to a finite number")
        require(
            self,
            self.normalisation in get_args(Normalisation),
            "normalisation",
            f"choose one of {list(get_args(Normalisation))}",
        )
        require(
            self,
            self.importance_cap is None or (math.isfinite(self.importance_cap) and self.importance_cap >= 1),
            "importance_cap",
            "set it to a finite number of 1 or more, or null for no importance weights",
        )

    def part_names(self, num_updates: int, *, commits: bool = False) -> list[str]:
        """The parts of the loss that say something with these settings.

        Args:
            num_updates: optimizer steps from each rollout.
            commits: whether draws decided over commits.
        """
        names = (
            ["policy"]
            + ["commit"] * commits
            + ["kl"] * (self.beta > 0)
            + ["entropy"] * (self.entropy_coeff != 0)
        )
        return names + ["ratio", "clip_fraction"] * (num_updates > 1)
