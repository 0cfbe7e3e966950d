"""Gradients of single noisy states, from which the error of any sampler of timesteps follows exactly.

A policy gradient is a sum over noisy states with coefficients that the sampler decides. With the inner
products of the states' gradients at hand, the error of a plan is a quadratic form in its coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from drift.advantages import group_advantages
from drift.contract import MaskedBatch, Rollout, TimestepPlan, TokenLogProbs
from drift.data.stream import collate_prompts
from drift.data.template import PromptTemplate
from drift.logprobs import token_logprobs
from drift.losses import LossConfig, kept_tokens
from drift.masking import masked_batch
from drift.models import DiffusionLM, load_tokenizer, resolve_folder
from drift.randomness import fold
from drift.rollout import DenoiseConfig, rollout_groups
from drift.samplers import FullSampler, TimestepSampler
from drift.sequence_loss import sequence_coefficients
from drift.tasks import SudokuTask, judge

Normalisation = Literal["trajectory", "sample"]


@dataclass(frozen=True)
class Objective:
    """What is to be estimated.

    Args:
        name: for the tables.
        normalisation: `trajectory`: of a row the sum over its timesteps of the sum of the kept tokens;
            `sample`: the mean over its timesteps of the mean of the kept tokens.
        current_only: learn from the tokens that the timestep itself committed alone.
        tau: of the clipped clean state, where others are learned from, too.
    """

    name: str
    normalisation: Normalisation
    current_only: bool
    tau: float = 0.0

    def tokens(self, policy: DiffusionLM, states: MaskedBatch) -> Tensor:
        """[m] of each state the sum, or the mean, of its kept tokens' log-probabilities, with their graph."""
        logp = token_logprobs(policy, states)
        kept = kept_tokens(logp, states, self.tau)
        total = (logp.logp * kept).sum(dim=1)
        return total if self.normalisation == "trajectory" else total / kept.sum(dim=1).clamp(min=1)

    def coefficients(self, states: MaskedBatch, num_rows: int) -> Tensor:
        """[m] float64 factors of what `tokens` gives in the gradient that a plan's states make."""
        factor = states.weight.double() * states.row_share * states.advantages / num_rows
        if self.normalisation == "trajectory" and states.num_timesteps is not None:
            factor = factor * states.num_timesteps
        return factor


EXACT = Objective("exact policy gradient", "trajectory", current_only=True)
PAPER = Objective("RLDF, tau 0.6", "sample", current_only=False, tau=0.6)


@torch.no_grad()
def judged_rollout(
    policy: DiffusionLM, decode: DenoiseConfig, prompts: int, blanks: tuple[int, int], group: int = 8
) -> Rollout:
    """Rollouts of 4 x 4 puzzles, with advantages; only rows that have one are kept.

    Args:
        policy: one that the tokenizer of the shipped policy fits.
        decode: how to decode.
        prompts: how many puzzles.
        blanks: fewest and most blank cells of a puzzle.
        group: completions of each.
    """
    task = SudokuTask(blanks=blanks)
    template = PromptTemplate(load_tokenizer(resolve_folder("sudoku_base")), None, 64)
    rows = task.rows("train", prompts)
    batch = collate_prompts(task, template, rows, range(prompts), 0)
    rollout = rollout_groups(policy, batch, 16, decode, group_size=group)
    problems = [problem for problem in batch.problems for _ in range(group)]
    judge(batch, rollout, template.answers(rollout.completion_ids, problems), task.reward)
    assert rollout.rewards is not None
    rollout.advantages = group_advantages(rollout.rewards.sum(dim=1), group)
    return rollout.select(rollout.advantages != 0)


class Gradients:
    """The inner products of all states' gradients under an objective, and the full gradient.

    Args:
        policy: what is differentiated.
        rollout: rows with advantages.
        objective: what is estimated.
    """

    def __init__(self, policy: DiffusionLM, rollout: Rollout, objective: Objective) -> None:
        self.policy, self.rollout, self.objective = policy, rollout, objective
        self.num_rows = len(rollout.completion_ids)
        self.weights = [weight for weight in policy.parameters() if weight.requires_grad]
        full = FullSampler().plan(rollout)
        states = self._batch(full)
        self.place = torch.full((self.num_rows, int(rollout.step_map.max()) + 1), -1)
        self.place[states.row, _timesteps(rollout, states)] = torch.arange(len(states))
        gradients = torch.stack([self.gradient(states.select(torch.tensor([i]))) for i in range(len(states))])
        self.products = torch.cat([part @ gradients.T for part in gradients.split(256)]).double()
        self.full = objective.coefficients(states, self.num_rows)
        self.direction = self.full.float() @ gradients
        self.norms = self.products.diagonal().sqrt()
        self.states = states

    def gradient(self, states: MaskedBatch, factor: Tensor | None = None) -> Tensor:
        """[D] gradient of the sum of what `Objective.tokens` gives of these states, times a factor each."""
        found = self.objective.tokens(self.policy, states)
        total = found.sum() if factor is None else (found * factor).sum()
        return torch.cat([part.flatten() for part in torch.autograd.grad(total, self.weights)])

    def coefficients(self, plan: TimestepPlan) -> tuple[Tensor, int]:
        """[M] factors of all states in the estimate of a plan, and how many states it feeds."""
        states = self._batch(plan)
        factor = self.objective.coefficients(states, self.num_rows)
        place = self.place[states.row, _timesteps(self.rollout, states)]
        return torch.zeros_like(self.full).index_add(0, place, factor), len(states)

    def errors(self, sampler: TimestepSampler, num_plans: int) -> dict[str, float]:
        """How far the estimates of a sampler's plans are from the full gradient.

        Its states are timesteps of the rollout, and it learns from the tokens that the objective has.
        """
        found = [self.coefficients(sampler.plan(keyed(self.rollout, i))) for i in range(num_plans)]
        drawn, cost = torch.stack([one for one, _ in found]), sum(num for _, num in found)
        product = partial(_product, self.products)
        return _figures(
            squared=product(drawn - self.full, drawn - self.full),
            along=product(drawn, self.full.expand_as(drawn)),
            own=product(drawn, drawn),
            bias=product((drawn.mean(dim=0) - self.full)[None], (drawn.mean(dim=0) - self.full)[None]),
            full=product(self.full[None], self.full[None]),
            passes=cost / num_plans / self.num_rows,
        )

    def errors_of_others(self, sampler: TimestepSampler, num_plans: int) -> dict[str, float]:
        """The same for any other sampler, plan by plan."""
        found, cost = [], 0
        for i in range(num_plans):
            states = self._batch(sampler.plan(keyed(self.rollout, i)))
            found.append(self._other_gradient(states))
            cost += len(states)
        drawn, full = torch.stack(found).double(), self.direction.double()
        return _figures(
            squared=(drawn - full).square().sum(dim=1),
            along=drawn @ full,
            own=drawn.square().sum(dim=1),
            bias=(drawn.mean(dim=0) - full).square().sum()[None],
            full=full.square().sum()[None],
            passes=cost / num_plans / self.num_rows,
        )

    def _other_gradient(self, states: MaskedBatch) -> Tensor:
        """[D] what an update takes of the states; a likelihood of whole completions is not one per token."""
        parts = torch.arange(len(states)).split(512)
        if states.sequence is None:
            factor = self.objective.coefficients(states, self.num_rows).float()
            return torch.stack([self.gradient(states.select(part), factor[part]) for part in parts]).sum(
                dim=0
            )
        assert states.length is not None
        with torch.no_grad():
            logp = torch.cat([token_logprobs(self.policy, states.select(part)).logp for part in parts])
        found = sequence_coefficients(TokenLogProbs(logp=logp), states, LossConfig(), num_rows=self.num_rows)
        factor = found.coefficients * states.length[:, None]
        total = torch.zeros_like(self.direction)
        for part in parts:
            objective = (token_logprobs(self.policy, states.select(part)).logp * factor[part]).sum()
            total += torch.cat([one.flatten() for one in torch.autograd.grad(objective, self.weights)])
        return total

    def _batch(self, plan: TimestepPlan) -> MaskedBatch:
        return masked_batch(
            self.rollout, plan, self.policy.mask_token_id, current_only=self.objective.current_only
        )


def keyed(rollout: Rollout, draw: int) -> Rollout:
    """The rollout under other keys: another plan."""
    assert rollout.seeds is not None
    return replace(rollout, seeds=fold(rollout.seeds, draw))


def _timesteps(rollout: Rollout, states: MaskedBatch) -> Tensor:
    """[M] which timestep each state is that before."""
    return torch.where(states.current, rollout.step_map[states.row], -1).amax(dim=1)


def _product(products: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return ((one @ products) * other).sum(dim=1)


def _figures(
    *, squared: Tensor, along: Tensor, own: Tensor, bias: Tensor, full: Tensor, passes: float
) -> dict[str, float]:
    """In the full gradient's norm: error, bias (less what few plans leave of the noise), deviation."""
    norm, num = full.sqrt(), len(squared)
    total = squared.mean()
    variance = (total - bias[0]).clamp(min=0) * num / max(num - 1, 1)
    return {
        "passes": round(passes, 2),
        "error": float((total.sqrt() / norm)[0]),
        "bias": float(((bias[0] - variance / num).clamp(min=0).sqrt() / norm)[0]),
        "deviation": float((variance.sqrt() / norm)[0]),
        "cosine": float((along / (own.sqrt() * norm)).mean()),
    }
