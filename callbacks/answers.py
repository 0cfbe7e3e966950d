"""Writes every answer of a test to a file: what was asked, what came, how it was judged and decoded."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from drift.contract import PromptBatch, Rollout
from drift.distributed import gather_over_ranks, rank
from drift.policy_module import PolicyModule
from drift.results import Earlier, find_earlier, keep_earlier


class AnswerCallback(Callback):
    """Writes one JSON line an answer of `drift test`, in the order of data sets, prompts, cells and samples.

    While the test runs each rank writes lines of its own, `.NAME.RANK.part` beside the file; at the end they
    become the file, at once. A test that was stopped leaves the parts.

    `token_ids` and `step_map` (the timestep that committed each token) end where the row had ended.

    Args:
        path: the file; None: `test.jsonl` in the run's folder, where that of an earlier test is kept under
            a number.
        enabled: False writes nothing.
    """

    def __init__(self, path: str | None = None, enabled: bool = True) -> None:
        self.given_path = path
        self.enabled = enabled
        self.path = Path()
        self._part: TextIO | None = None
        self._earlier: list[Earlier] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run's folder, which all ranks must do together."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self.path = folder / "test.jsonl" if self.given_path is None else Path(self.given_path)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts this rank's part."""
        if self.given_path is None:
            self._earlier = find_earlier(self.path.parent, self.path.stem)
        if self.enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name}.{rank()}.part")
            self._part = part.open("w", encoding="utf-8")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the answers of the batch."""
        if self._part is None or not isinstance(pl_module, PolicyModule):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        name = data.evaluation_sets["test"][dataloader_idx].name
        cells = [
            {"length": cell.length, "decode": cell.name, "rows": list(_rows(data.template, batch, rollout))}
            for cell, rollout in zip(pl_module.cells, batch.grid, strict=True)
        ]
        for number, (problem, position) in enumerate(
            zip(batch.problems, batch.positions.tolist(), strict=True)
        ):
            asked = {"prompt": data.template.render(problem), "truth": problem.answer}
            for cell in cells:
                samples = len(cell["rows"]) // len(batch.problems)
                for sample, row in enumerate(cell["rows"][number * samples : (number + 1) * samples]):
                    place = {"set": dataloader_idx, "dataset": name, "position": position}
                    kind = {"length": cell["length"], "decode": cell["decode"], "sample": sample}
                    self._part.write(json.dumps({**place, **kind, **asked, **row}) + "\n")
        self._part.flush()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes one file of the parts; that of an earlier test gets another name."""
        if trainer.is_global_zero:
            keep_earlier(self._earlier)
        if self._part is None:
            return
        self._part.close()
        parts = [Path(name) for name in gather_over_ranks(self._part.name)]
        self._part = None
        if trainer.is_global_zero:
            unseen = [str(part) for part in parts if not part.is_file()]
            if unseen:
                rank_zero_info(f"the answers stay in parts on their machines: {', '.join(map(str, parts))}")
            else:
                merge(parts, self.path)
                rank_zero_info(f"the answers are in {self.path}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the part of a test that was stopped."""
        if self._part is not None:
            self._part.close()
            self._part = None


def merge(parts: list[Path], path: Path) -> None:
    """One file of several, each in the order of sets and positions; the parts are gone afterwards.

    Args:
        parts: JSONL files; no position of a set is in two of them.
        path: the file to write.
    """
    new = path.with_name(f".{path.name}.new")
    with ExitStack() as stack:
        files = [stack.enter_context(part.open(encoding="utf-8")) for part in parts]
        out = stack.enter_context(new.open("w", encoding="utf-8"))
        out.writelines(heapq.merge(*files, key=_place))
    new.replace(path)
    for part in parts:
        part.unlink()


def _place(line: str) -> tuple[int, int]:
    found = json.loads(line)
    return found["set"], found["position"]


def _rows(template: Any, batch: PromptBatch, rollout: Rollout) -> Iterator[dict[str, Any]]:
    """What is written of each answer."""
    assert rollout.rewards is not None
    assert rollout.correct is not None
    assert rollout.finished is not None
    assert rollout.num_timesteps is not None
    samples = len(rollout.completion_ids) // len(batch.problems)
    problems = [problem for problem in batch.problems for _ in range(samples)]
    texts = template.answers(rollout.completion_ids, problems)
    rewards = rollout.rewards.sum(dim=1).tolist()
    for number, text in enumerate(texts):
        timesteps = int(rollout.num_timesteps[number])
        steps = rollout.step_map[number].tolist()
        decoded = next((i for i, step in enumerate(steps) if step == timesteps), len(steps))
        yield {
            "answer": text,
            "reward": rewards[number],
            "correct": bool(rollout.correct[number]),
            "finished": bool(rollout.finished[number]),
            "timesteps": timesteps,
            "token_ids": rollout.completion_ids[number, :decoded].tolist(),
            "step_map": steps[:decoded],
        }
