"""Any task of reasoning-gym: more than a hundred generators of puzzles, each with its verifier."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards.reasoning_gym import ReasoningGymReward
from drift.tasks.procedural import ProceduralTask

_INSTRUCTION = "Give your final answer between <answer> and </answer>."
_MAX_NUMBER = 2**31
_MAX_DRAWS = 100


class ReasoningGymTask(ProceduralTask):
    """Puzzles of a reasoning-gym generator (github.com/open-thought/reasoning-gym, arXiv 2505.24760).

    A puzzle depends on its number alone, which is drawn as in every procedural task: the seed, the split and
    the place decide it, whatever the process. A puzzle of an evaluation split takes ten draws on average, so
    slow generators want a small data.num_validation. Needs `pip install drift[reasoning]`.

    Args:
        name: the generator, such as "spell_backward" or "tower_of_hanoi".
        settings: of the generator's configuration, without seed and size; None for its defaults.
        seed: key of all draws.
        instruction: line added below the question; empty for none.
        tag: the answer stands in the last <tag>...</tag> of the completion; None: it is the whole completion.
        timeout_seconds: time for the judgement of one answer, > 0.
        num_workers: processes that make and judge, >= 1.

    Raises:
        ConfigError: reasoning-gym is not installed, it has no such generator or setting, or the verifier pays
            for nonsense.
    """

    fields = ("question", "number")

    def __init__(
        self,
        name: str,
        settings: dict[str, Any] | None = None,
        seed: int = 0,
        instruction: str = _INSTRUCTION,
        tag: str | None = "answer",
        timeout_seconds: float = 5.0,
        num_workers: int = 2,
    ) -> None:
        super().__init__(seed)
        self.name = name
        self.instruction = instruction
        self.tag = tag
        self.reward = self._verifier = ReasoningGymReward(name, settings, tag, timeout_seconds, num_workers)

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of a row; its answer is empty where several are right.

        Raises:
            ConfigError: the row is none that this task has made.
        """
        self.require_fields(row)
        self.require(isinstance(row["question"], str), row, "question", "a text")
        self.require(
            isinstance(row["number"], int), row, "number", "the integer that the question is made from"
        )
        answer = row.get("answer")
        shown = answer if self.tag is None else f"<{self.tag}>{answer}</{self.tag}>"
        return Problem(
            prompt="\n".join(part for part in (row["question"], self.instruction) if part),
            answer=answer or "",
            demonstration=None if answer is None else shown,
            row=dict(row),
        )

    def generate(self, rng: Random) -> dict[str, Any]:
        """The row of a number; numbers that the generator gives up on are passed over."""
        for _ in range(_MAX_DRAWS):
            number = rng.randrange(_MAX_NUMBER)
            made = self._verifier.make(number)
            if made is not None:
                return {**made, "number": number}
        raise ConfigError(
            f"generator {self.name!r} of reasoning-gym gave up {_MAX_DRAWS} times in a row: "
            "choose other settings of data.task"
        )

    def canonical(self, row: dict[str, Any]) -> str:
        """The question."""
        return row["question"]
