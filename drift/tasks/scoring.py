"""Judging a batch of completions, and saying which one a reward could not judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drift.contract import ConfigError, Problem, SampleError
from drift.rewards import Reward


def score(reward: Reward, completions: Sequence[str], problems: Sequence[Problem]) -> Tensor:
    """The rewards of completions, [N] float32 on the CPU.

    Args:
        reward: the judge.
        completions: [N] texts.
        problems: [N] what they answer.

    Raises:
        SampleError: where the reward raises, or doesn't give one finite number a completion; it holds one
            such completion.
    """
    try:
        values = torch.as_tensor(reward(completions, problems), dtype=torch.float32)
    except ConfigError:
        raise
    except Exception as error:
        culprit, reason = _culprit(reward, completions, problems, error)
        sample = _describe(completions[culprit], problems[culprit], reason)
        raise SampleError(
            f"{type(reward).__name__} raised {reason}; "
            "a reward must judge whatever the policy writes: mend it",
            sample,
        ) from error
    if values.shape != (len(completions),):
        raise SampleError(
            f"{type(reward).__name__} gave values of shape {list(values.shape)} for {len(completions)} "
            "completions: it must give one number for each",
            _describe(completions[0], problems[0], f"shape {list(values.shape)}"),
        )
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise SampleError(
            f"{type(reward).__name__} gave {values[bad].item()} for completion {bad}: rewards must be finite",
            _describe(completions[bad], problems[bad], str(values[bad].item())),
        )
    return values


def _culprit(
    reward: Reward, completions: Sequence[str], problems: Sequence[Problem], error: Exception
) -> tuple[int, str]:
    """The first completion that alone makes the reward raise, else the first of all; and what was raised."""
    for number, (completion, problem) in enumerate(zip(completions, problems, strict=True)):
        try:
            reward([completion], [problem])
        except Exception as alone:
            return number, f"{type(alone).__name__}: {alone}"
    return 0, f"{type(error).__name__}: {error} (for the whole batch, not for a single completion)"


def _describe(completion: str, problem: Problem, reason: str) -> dict[str, str]:
    return {"reason": reason, "prompt": problem.prompt, "answer": problem.answer, "completion": completion}
