"""Reward of a reasoning-gym problem: what its own verifier gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drift.contract import ConfigError, Problem
from drift.rewards.base import Reward
from drift.rewards.math_workers import JudgePool

_SCRIPT = Path(__file__).with_name("reasoning_gym_judge.py")
_MAKE_SECONDS = 60.0  # the slowest generators take about one second
_MAX_CHARACTERS = 20_000
# One thread each, and sets in the same order in every process and on every machine.
_ENVIRONMENT = ("PYTHONHASHSEED=0", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", "MPLBACKEND=agg")


class ReasoningGymReward(Reward):
    """The score, 0 to 1, that a generator's verifier gives; many give a part of it for a good try.

    Generators and verifiers run in processes of their own, because some verifiers evaluate the answer as
    Python code: see drift/rewards/reasoning_gym_judge.py for what such an answer may hold. One that raises,
    crashes or takes too long is worth 0. A problem is known by its number (`problem.row["number"]`).

    Args:
        name: the generator, as reasoning-gym registers it.
        settings: of its configuration, without seed and size; None for its defaults.
        tag: the answer stands in the last <tag>...</tag> of the completion; None: it is the whole completion.
        timeout_seconds: time for the judgement of one answer, > 0.
        num_workers: processes, >= 1.

    Raises:
        ConfigError: an argument is out of its range, reasoning-gym is not installed, it has no such generator
            or setting, or the verifier pays for nonsense.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any] | None = None,
        tag: str | None = "answer",
        timeout_seconds: float = 5.0,
        num_workers: int = 2,
    ) -> None:
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds={timeout_seconds!r} of ReasoningGymReward must be above 0")
        if num_workers < 1:
            raise ConfigError(f"num_workers={num_workers!r} of ReasoningGymReward must be at least 1")
        if tag == "":
            raise ConfigError("tag='' of ReasoningGymReward: name one, or null for the whole completion")
        taken = sorted({"seed", "size"} & set(settings or ()))
        if taken:
            raise ConfigError(f"settings of ReasoningGymReward hold {taken}: remove them, Drift sets them")
        if find_spec("reasoning_gym") is None:
            raise ConfigError("reasoning-gym is not installed: pip install 'drift[reasoning]'")
        self.name = name
        self.settings = dict(settings or {})
        self.tag = tag
        self.timeout_seconds = timeout_seconds
        self.num_workers = num_workers
        python = (sys.executable, "-P", str(_SCRIPT))
        self._pool = JudgePool(
            num_workers,
            _MAKE_SECONDS + timeout_seconds,
            ("env", *_ENVIRONMENT, *python, name, json.dumps(self.settings)),
            f"Correct name={name!r} or settings={self.settings!r} of the task, or choose another generator",
        )
        self.make(0)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """The settings alone: a copy starts processes of its own."""
        return type(self), (self.name, self.settings, self.tag, self.timeout_seconds, self.num_workers)

    def make(self, number: int) -> dict[str, Any] | None:
        """The question and, where there is a single right one, the answer of a problem.

        None: the generator gives up on this number.

        Args:
            number: of the problem, 0 to 2^31 - 1.

        Raises:
            ConfigError: the generator cannot be used, or takes too long.
        """
        (made,) = self._pool.exchange([{"number": number}])
        if made is None:
            raise ConfigError(
                f"generator {self.name!r} of reasoning-gym does not end within {_MAKE_SECONDS:g} seconds, or "
                f"crashes, for number {number}: choose easier settings"
            )
        return None if "failed" in made else made

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> Tensor:
        """[N] float32 rewards on the CPU.

        Raises:
            RuntimeError: a problem cannot be made again, for example because it is from another version.
        """
        keys = [
            (problem.row["number"], problem.row["question"], extract_tagged(completion, self.tag))
            for completion, problem in zip(completions, problems, strict=True)
        ]
        asked = [key for key in dict.fromkeys(keys) if key[2] is not None and len(key[2]) <= _MAX_CHARACTERS]
        replies = self._pool.exchange(
            [
                {"number": n, "question": q, "answer": answer, "timeout_seconds": self.timeout_seconds}
                for n, q, answer in asked
            ]
        )
        scores = {}
        for key, reply in zip(asked, replies, strict=True):
            if reply is not None and "failed" in reply:
                raise RuntimeError(f"problem {key[0]} of {self.name!r}: {reply['failed']}")
            scores[key] = 0.0 if reply is None else reply["score"]
        return torch.tensor([scores.get(key, 0.0) for key in keys], dtype=torch.float32)

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        self._pool.close()


def extract_tagged(text: str, tag: str | None) -> str | None:
    """What stands in the last <tag>...</tag>, None where there is none; without a tag, the whole text.

    Args:
        text: what may hold it.
        tag: its name; None: there are no tags.
    """
    if tag is None:
        return text.strip()
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()
