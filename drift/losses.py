"""The RLDF loss at noisy states (arXiv 2605.25638): pure functions of log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from drift.contract import LossOutput, MaskedBatch, TokenLogProbs, require
from drift.mismatch import importance_weights, measure_mismatch

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
            estimates that sum, and divides by rows: with tau null the policy gradient itself.
        importance_cap: the policy-gradient term of a token committed at the noisy state's own timestep is
            multiplied by min(update's probability / rollout's probability, importance_cap), both of the
            weights that made the rollout, >= 1, such as 2.0: against cached or low-precision rollouts, whose
            probabilities differ from those of the update. None: no weights.
        temperature: of the softmax whose log-probabilities the tokens have here, > 0: that of the rollouts,
            to learn from the likelihood with which tokens were drawn. Commits are untempered, as in rollouts.
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
    temperature: float = 1.0
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
        good = 1e-3 <= self.temperature <= 1e3
        require(self, good, "temperature", "set it to that of the rollouts, from 1e-3 to 1e3")
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


def kept_tokens(feedback: TokenLogProbs, batch: MaskedBatch, tau: float | None) -> Tensor:
    """The clipped clean state: [M,C] bool, the scored tokens that the loss is made of.

    Args:
        feedback: the probabilities that decide: current ones for one update per rollout, else old ones.
        batch: M noisy states.
        tau: least probability of a token that was not committed at the state's own timestep; None: it does
            not count.
    """
    if tau == 0:
        return batch.scored
    if tau is None:
        return batch.current
    return batch.scored & ((feedback.logp.detach() >= math.log(tau)) | batch.current)


def kept_per_slot(kept: Tensor, batch: MaskedBatch) -> Tensor:
    """[K] float32, kept tokens of each of the plan's draws: what normalisation `token` divides by."""
    count = torch.zeros(batch.num_slots, dtype=torch.float32, device=kept.device)
    return count.index_add(0, batch.slot, kept.sum(dim=1).float())


def kl_estimate(logp: Tensor, reference: Tensor, kind: KL) -> Tensor:
    """Estimate of KL(policy || reference) per token, nats, from the log-probabilities of the same tokens."""
    difference = reference - logp
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    return difference.exp() - 1 - difference


def rldf_loss(
    policy: TokenLogProbs,
    batch: MaskedBatch,
    config: LossConfig,
    *,
    old: TokenLogProbs | None = None,
    reference: TokenLogProbs | None = None,
    num_kept: Tensor | None = None,
    num_rows: Tensor | float | None = None,
) -> LossOutput:
    """The policy loss of some noisy states of a batch.

    Args:
        policy: log-probabilities of the model being trained (with entropy where entropy_coeff is not 0).
        batch: the M noisy states they belong to.
        config: settings.
        old: log-probabilities at the same noisy states before the first update of this rollout: PPO's
            clipped ratio. None: there is one update per rollout, REINFORCE.
        reference: those of the frozen reference; None leaves the KL out.
        num_kept: [K] kept tokens per slot of the whole batch; None: these states are the whole batch.
        num_rows: rows of the whole batch; None: these states are the whole batch.

    Returns:
        loss, and the parts `policy`, `kl`, `entropy`, `ratio` and `clip_fraction` under the same reduction;
        the mismatch with the rollout, where its probabilities are known.

    Raises:
        ConfigError: where importance weights are asked for and the rollout's probabilities are unknown.
    """
    proximal = old or policy
    kept = kept_tokens(proximal, batch, config.tau)
    state_share = _state_share(kept, batch, config, num_kept, num_rows)
    share = state_share[:, None].expand_as(kept)[kept]
    # Only kept tokens from here on: an infinite value at a dropped token would turn into NaN in backward.
    logp = policy.logp[kept]
    advantages = batch.advantages[:, None].expand_as(kept)[kept]
    before = None if old is None else old.logp[kept]
    objective, ratio, clipped = policy_objective(logp, before, advantages, config)
    if config.importance_cap is not None:
        objective = objective * importance_weights(proximal.logp, batch, config.importance_cap)[kept]
    objective = config.token_weight * torch.where(advantages < 0, config.negative_weight, 1.0) * objective
    per_token = {"policy": -objective, "ratio": ratio, "clip_fraction": clipped}
    total = -objective
    if reference is not None:
        per_token["kl"] = kl_estimate(logp, reference.logp[kept], config.kl)
        if config.beta:
            total = total + config.beta * per_token["kl"]
    if policy.entropy is not None:
        per_token["entropy"] = policy.entropy[kept]
    if config.entropy_coeff:
        total = total + config.entropy_coeff * _entropy_term(policy, reference, kept)
    parts = {name: (share * value.detach()).sum() for name, value in per_token.items()}
    loss = (share * total).sum()
    if policy.top is not None and config.commit_weight:
        commits = commit_loss(policy, batch, state_share, config, old)
        loss, parts["commit"] = loss + commits, commits.detach()
    return LossOutput(
        loss=loss,
        parts=parts,
        num_kept=kept.sum(),
        num_scored=batch.scored.sum(),
        mismatch=measure_mismatch(proximal.logp, batch, config.importance_cap),
    )


def policy_objective(
    logp: Tensor, old: Tensor | None, advantages: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """What is to be raised, for each of n actions, the probability ratio, and whether clipping stopped it.

    Args:
        logp: [n] log-probabilities of the actions, with their graph.
        old: [n] those before the first update: PPO's clipped ratio; None: REINFORCE.
        advantages: [n].
        config: the clip.
    """
    if old is None:
        return logp * advantages, torch.ones_like(logp), torch.zeros_like(logp)
    ratio = (logp - old).exp()
    bounded = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
    clipped = (bounded * advantages < ratio * advantages).float()
    return torch.minimum(ratio * advantages, bounded * advantages), ratio.detach(), clipped


def commit_logprobs(found: TokenLogProbs, batch: MaskedBatch) -> Tensor:
    """[d] log-probabilities of all decisions over commits, state by state, in nats.

    A masked position commits with probability q = sigmoid((m - threshold) / width), m being the probability
    of its likeliest token; a decision to stay masked has 1 - q.

    Args:
        found: the likeliest tokens' log-probabilities.
        batch: the M noisy states with their decisions.
    """
    assert found.top is not None
    assert batch.decision is not None
    assert batch.commit_rule is not None
    decided = batch.decision != 0
    threshold, width = (part.expand_as(decided)[decided] for part in batch.commit_rule.split(1, dim=1))
    return logsigmoid(batch.decision[decided] * (found.top[decided].exp() - threshold) / width)


def commit_loss(
    policy: TokenLogProbs,
    batch: MaskedBatch,
    state_share: Tensor,
    config: LossConfig,
    old: TokenLogProbs | None,
) -> Tensor:
    """The policy loss of the decisions over commits: [].

    Args:
        policy: of the model being trained, with the likeliest tokens.
        batch: the M noisy states with their decisions.
        state_share: [M] factor of each state's actions in the loss.
        config: settings.
        old: see `rldf_loss`.
    """
    assert batch.decision is not None
    decided = batch.decision != 0
    logp, before = commit_logprobs(policy, batch), None if old is None else commit_logprobs(old, batch)
    share, advantages = (
        part[:, None].expand_as(decided)[decided] for part in (state_share, batch.advantages)
    )
    objective, _, _ = policy_objective(logp, before, advantages, config)
    return -config.commit_weight * (share * objective).sum()


def _entropy_term(policy: TokenLogProbs, reference: TokenLogProbs | None, kept: Tensor) -> Tensor:
    """|H_ref - H| of every kept token, or H without a reference."""
    if policy.entropy is None:
        raise ValueError("entropy_coeff is not 0, but the log-probabilities come without entropy")
    entropy = policy.entropy[kept]
    if reference is None:
        return entropy
    if reference.entropy is None:
        raise ValueError("entropy_coeff is not 0, but the reference's log-probabilities come without entropy")
    return (reference.entropy[kept] - entropy).abs()


def _state_share(
    kept: Tensor,
    batch: MaskedBatch,
    config: LossConfig,
    num_kept: Tensor | None,
    num_rows: Tensor | float | None,
) -> Tensor:
    """[M] factor of each kept token, and of each decision, of a noisy state in the loss."""
    if config.normalisation == "token":
        if num_kept is None:
            num_kept = kept_per_slot(kept, batch)
        return batch.weight / (batch.num_slots * num_kept.clamp(min=1)[batch.slot])
    rows = batch.row.unique().numel() if num_rows is None else num_rows
    share = batch.weight * batch.row_share / rows
    if config.normalisation == "sample":
        return share / kept.sum(dim=1).clamp(min=1)
    return share if batch.num_timesteps is None else share * batch.num_timesteps
