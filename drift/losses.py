"""The RLDF loss at noisy states (arXiv 2605.25638): pure functions of log-probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from drift.contract import ConfigError, LossOutput, MaskedBatch, Rollout, TokenLogProbs
from drift.loss_config import KL, LossConfig, Normalisation
from drift.mismatch import importance_weights, measure_mismatch

__all__ = [
    "KL",
    "LossConfig",
    "Normalisation",
    "kept_per_slot",
    "kept_tokens",
    "kl_estimate",
    "learns_commits",
    "moving_rows",
    "rldf_loss",
]


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
    coefficients: Tensor | None = None,
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
        coefficients: [M,C] derivatives of a sequence-level objective with respect to the tokens'
            log-probabilities, which take the place of the tokens' policy-gradient term: it has their
            gradient, and the value 0. None: the loss is one of tokens.
        num_kept: [K] kept tokens per slot of the whole batch; None: these states are the whole batch.
        num_rows: rows of the whole batch; None: these states are the whole batch.

    Returns:
        loss, and the parts `policy`, `kl`, `entropy`, `ratio` and `clip_fraction` under the same reduction;
        the mismatch with the rollout, where its probabilities are known.

    Raises:
        ConfigError: where importance weights are asked for and the rollout's probabilities are unknown, or
            commits are to be learned and the states are not those at which they were drawn.
    """
    proximal = old or policy
    kept = kept_tokens(proximal, batch, config.tau)
    state_share = _state_share(kept, batch, config, num_kept, num_rows)
    share = state_share[:, None].expand_as(kept)[kept]
    # Only kept tokens from here on: an infinite value at a dropped token would turn into NaN in backward.
    logp = policy.logp[kept]
    if coefficients is None:
        per_token = _policy_terms(logp, kept, batch, config, old, proximal)
        loss, total = logp.new_zeros(()), per_token["policy"]
    else:
        # The coefficients have the whole batch's reduction in them.
        loss, total, per_token = -(coefficients[kept] * (logp - logp.detach())).sum(), 0 * logp, {}
    if reference is not None:
        per_token["kl"] = kl_estimate(logp, reference.logp[kept], config.kl)
        if config.beta:
            total = total + config.beta * per_token["kl"]
    if policy.entropy is not None:
        per_token["entropy"] = policy.entropy[kept]
    if config.entropy_coeff:
        total = total + config.entropy_coeff * _entropy_term(policy, reference, kept)
    parts = {name: (share * value.detach()).sum() for name, value in per_token.items()}
    loss = loss + (share * total).sum()
    if learns_commits(batch, config) and policy.top is not None:
        commits = commit_loss(policy, batch, state_share, config, old)
        loss, parts["commit"] = loss + commits, commits.detach()
    return LossOutput(
        loss=loss,
        parts=parts,
        share=share.sum(),
        num_kept=kept.sum(),
        num_scored=batch.scored.sum(),
        mismatch=measure_mismatch(proximal.logp, batch, config.importance_cap),
    )


def _policy_terms(
    logp: Tensor,
    kept: Tensor,
    batch: MaskedBatch,
    config: LossConfig,
    old: TokenLogProbs | None,
    proximal: TokenLogProbs,
) -> dict[str, Tensor]:
    """[n] of each kept token its policy-gradient term, its ratio and whether it was clipped, by name."""
    advantages = batch.advantages[:, None].expand_as(kept)[kept]
    before = None if old is None else old.logp[kept]
    objective, ratio, clipped = policy_objective(logp, before, advantages, config)
    weight = config.token_weight * torch.where(advantages < 0, config.negative_weight, 1.0)
    if config.importance_cap is not None:
        weight = weight * importance_weights(proximal.logp, batch, config.importance_cap)[kept]
    return {"policy": -weight * objective, "ratio": ratio, "clip_fraction": clipped}


def learns_commits(batch: MaskedBatch, config: LossConfig) -> bool:
    """Whether draws of commits are learned from.

    Args:
        batch: noisy states.
        config: settings.

    Raises:
        ConfigError: where they are to be, and the states are not those at which they were drawn.
    """
    if not config.commit_weight or batch.commit_rule is None:
        return False
    if batch.decision is None:
        raise ConfigError(
            f"commit_weight is {config.commit_weight}: the sampler's noisy states are not those at which "
            "draws decided over commits (TimestepPlan.replay is False); use a sampler of the rollout's own "
            "timesteps, or set it to 0"
        )
    return True


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


def moving_rows(rollout: Rollout, config: LossConfig) -> Tensor | None:
    """[N] bool, rows of advantages that have a gradient; None: all.

    Without KL and entropy term they are those whose advantage is not 0, or is above 0 where nothing is
    learned from what did worse than its group.

    Args:
        rollout: N rollouts with advantages.
        config: settings.
    """
    assert rollout.advantages is not None
    if config.beta > 0 or config.entropy_coeff:
        return rollout.trained
    moving = rollout.advantages != 0
    if config.negative_weight == 0 and (rollout.commit_kind is None or config.commit_weight == 0):
        moving = rollout.advantages > 0
    return moving if rollout.trained is None else moving & rollout.trained


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
    # Of whole completions, the plan's weights are per token already.
    if config.normalisation == "token" and batch.sequence is None:
        if num_kept is None:
            num_kept = kept_per_slot(kept, batch)
        return batch.weight / (batch.num_slots * num_kept.clamp(min=1)[batch.slot])
    rows = batch.row.unique().numel() if num_rows is None else num_rows
    share = batch.weight * batch.row_share / rows
    if config.normalisation == "sample" and batch.sequence is None:
        return share / kept.sum(dim=1).clamp(min=1)
    return share if batch.num_timesteps is None else share * batch.num_timesteps
