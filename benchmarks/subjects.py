"""The tasks that `bench_learning` learns, each with the policy that it starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from drift.tasks import CountdownTask, SudokuTask, Task


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A task, and the policy that starts on it.

    Args:
        task: makes the task under a seed.
        length: positions of a completion, one block.
        base_steps: steps of fine-tuning on demonstrations that make the base policy; 0: a shipped policy.
        policy: the shipped policy, or the one whose shape and tokenizer the base has.
        prompts: of a step.
        point_passes: passes of rows between two points of the curve.
        num_validation: puzzles for a point of the curve.
        num_test: fresh puzzles for the final figure.
    """

    task: type[Task]
    settings: Mapping[str, Any]
    length: int = 16
    base_steps: int = 0
    policy: str = "sudoku_base"
    prompts: int = 64
    point_passes: float = 2e5
    num_validation: int = 2048
    num_test: int = 2048

    def make(self, seed: int) -> Any:
        """The task under a seed."""
        return self.task(seed=seed, **self.settings)

    def description(self) -> dict[str, Any]:
        """What runs are comparable by, as JSON has it."""
        settings = {**asdict(self), "task": self.task.__name__}
        del settings["point_passes"]
        return json.loads(json.dumps(settings))

    @property
    def digest(self) -> str:
        """Of what a base policy and its figures follow from; their files have it in their names."""
        settings = self.description()
        del settings["num_validation"]
        return blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()


SUBJECTS = {
    "quickstart": Subject(
        task=SudokuTask,
        settings={"blanks": (6, 9)},
        prompts=16,
        point_passes=1e4,
        num_validation=512,
        num_test=1024,
    ),
    "sudoku": Subject(task=SudokuTask, settings={"blanks": (8, 12)}, base_steps=550, num_validation=1024),
    "countdown": Subject(
        task=CountdownTask,
        settings={
            "num_numbers": 3,
            "max_number": 20,
            "max_target": 100,
            "prompt": "{numbers} = {target}",
            "right_share": 0.5,
        },
        base_steps=3000,
        prompts=16,
        point_passes=5e4,
        num_validation=512,
        num_test=1024,
    ),
}
