"""Judging a batch of completions by one or several rewards, and saying what a reward could not judge."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drift.contract import ConfigError, Problem, PromptBatch, Rollout, SampleError
from drift.rewards import Reward

# What stands beside the parts under `reward/` in the logs.
_TAKEN = ("mean", "accuracy", "seconds", "spread")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_SHOWN = 80  # characters of a prompt or a value in a message


@dataclass(frozen=True)
class ExtraReward:
    """A reward beside the task's own: it adds to what training learns from, never to what is correct.

    Args:
        reward: the judge.
        weight: its factor in the sum, in which the task's own reward counts once; below 0 it is a penalty.
        name: what it is logged as, `reward/NAME`; None: after its class, `format` for FormatReward.

    Raises:
        ConfigError: the weight is 0 or not finite, or the name is none.
    """

    reward: Reward
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ConfigError(
                f"rollout.extra_rewards.weight is {self.weight}: set it to a number other than 0, or drop "
                "the reward"
            )
        if self.name is not None and not re.fullmatch(r"\w+", self.name):
            raise ConfigError(f"rollout.extra_rewards.name is {self.name!r}: use letters, digits and _ only")


def part_names(reward: Reward, extra: Sequence[ExtraReward] = ()) -> tuple[str, ...]:
    """The names of the parts of the sum, the task's own reward first.

    Args:
        reward: the task's own.
        extra: what is added to it.

    Raises:
        ConfigError: two parts have one name, or a part has the name of another figure.
    """
    names = (_name(reward), *(part.name or _name(part.reward) for part in extra))
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"rollout.extra_rewards has the name {name!r} for several rewards {list(names)}: "
                "give each its own `name`"
            )
        if name in _TAKEN:
            raise ConfigError(
                f"rollout.extra_rewards has the name {name!r}, under which drift logs something else: "
                "set another `name`"
            )
    return names


def judge(
    batch: PromptBatch,
    rollout: Rollout,
    completions: Sequence[str],
    reward: Reward,
    extra: Sequence[ExtraReward] = (),
) -> None:
    """Fills in the rollout's `scores`, `reward_names`, `rewards` and `correct`.

    Args:
        batch: the prompts, each with N / B completions.
        rollout: the completions as tokens.
        completions: [N] the same as texts.
        reward: the task's own reward: an answer that it gives 1 or more is correct.
        extra: what is added to it.

    Raises:
        SampleError: see `score`.
        ConfigError: see `part_names`.
    """
    names = part_names(reward, extra)
    group_size = len(completions) // max(len(batch.problems), 1)
    problems = [problem for problem in batch.problems for _ in range(group_size)]
    places = batch.positions.repeat_interleave(group_size).tolist()
    num_tokens = rollout.completion_mask.sum(dim=1).cpu()
    parts = [
        score(judge, completions, problems, num_tokens, places)
        for judge in (reward, *(part.reward for part in extra))
    ]
    scores = torch.stack(parts, dim=1).to(rollout.completion_ids.device)
    weights = torch.tensor([1.0, *(part.weight for part in extra)], device=scores.device)
    rollout.scores, rollout.reward_names = scores, names
    rollout.rewards, rollout.correct = scores * weights, scores[:, 0] >= 1


def score(
    reward: Reward,
    completions: Sequence[str],
    problems: Sequence[Problem],
    num_tokens: Tensor | None = None,
    places: Sequence[int] | None = None,
) -> Tensor:
    """The rewards of completions, [N] float32 on the CPU.

    Args:
        reward: the judge.
        completions: [N] texts.
        problems: [N] what they answer.
        num_tokens: [N] int64, their valid tokens; None where nobody counted them.
        places: [N] the place of each prompt in its data, for error messages; None: its number here.

    Raises:
        SampleError: where the reward raises, or doesn't give one finite number a completion; it names the
            class, the completion and the value, and holds one such completion.
    """
    name = type(reward).__name__
    places = range(len(completions)) if places is None else places

    def error(culprit: int, what: str, fix: str, reason: str) -> SampleError:
        problem = problems[culprit]
        about = f"completion {culprit}, to prompt {places[culprit]} ({_short(problem.prompt)})"
        sample = {"prompt": problem.prompt, "answer": problem.answer, "completion": completions[culprit]}
        return SampleError(
            f"{name} {what} for {about}: {fix}", {"reason": reason, "place": places[culprit], **sample}
        )

    try:
        found: Any = _judged(reward, completions, problems, num_tokens)
    except ConfigError:
        raise
    # SystemExit too: code of a completion that a reward runs must not end training as if it were done.
    except (Exception, SystemExit) as raised:
        culprit, reason = _culprit(reward, completions, problems, num_tokens, raised)
        raise error(
            culprit, f"raised {reason}", "a reward must judge whatever the policy writes: mend it", reason
        ) from raised
    try:
        values = torch.as_tensor(found).to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as raised:
        bad = _first_non_number(found)
        value = _short(found if bad is None else found[bad])
        raise error(bad or 0, f"gave {value}, no number,", "mend it", value) from raised
    if values.shape != (len(completions),):
        shape = f"shape {list(values.shape)}"
        raise SampleError(
            f"{name} gave values of {shape} for {len(completions)} completions, to prompts "
            f"{_short(list(places))}: it must give one number for each; the first value is "
            f"{values.flatten()[0].item() if values.numel() else 'missing'}",
            {"reason": shape, "prompt": problems[0].prompt, "completion": completions[0]} if problems else {},
        )
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise error(bad, f"gave {values[bad].item()}", "rewards must be finite", str(values[bad].item()))
    return values


def _name(reward: Reward) -> str:
    words = _WORD.findall(type(reward).__name__.removesuffix("Reward"))
    name = "_".join(words).lower()
    return f"{name}_reward" if name in _TAKEN else name or "reward"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _first_non_number(found: object) -> int | None:
    if not isinstance(found, Sequence) or isinstance(found, str):
        return None
    return next((i for i, value in enumerate(found) if not isinstance(value, int | float)), None)


def _judged(
    reward: Reward, completions: Sequence[str], problems: Sequence[Problem], num_tokens: Tensor | None
) -> object:
    if isinstance(reward, Reward):
        return reward.judge(completions, problems, num_tokens)
    return reward(completions, problems)  # a plain function of the user's own


def _culprit(
    reward: Reward,
    completions: Sequence[str],
    problems: Sequence[Problem],
    num_tokens: Tensor | None,
    error: BaseException,
) -> tuple[int, str]:
    """The first completion that alone makes the reward raise, else the first of all; and what was raised."""
    for i in range(len(completions)):
        alone = slice(i, i + 1)
        try:
            _judged(
                reward, completions[alone], problems[alone], None if num_tokens is None else num_tokens[alone]
            )
        except (Exception, SystemExit) as raised:
            return i, f"{type(raised).__name__}: {raised}"
    return 0, f"{type(error).__name__}: {error} (for the whole batch, not for a single completion)"
