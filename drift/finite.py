"""Steps whose numbers are not finite: a few in a row are skipped, then training stops with the batch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from drift.contract import PromptBatch, Rollout, SampleError
from drift.distributed import gather_over_ranks, sum_over_ranks

_FIX = "look at the samples, or go back to an earlier checkpoint with a lower model.optimizer.lr"


class SkippedSteps:
    """Counts the optimizer steps that were skipped in a row.

    Args:
        max_skipped: the most that may be.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.in_a_row = 0

    def add(self, what: str, value: Tensor, step: int, batch: PromptBatch, rollout: Rollout | None) -> None:
        """One more, with a warning; called on every rank.

        Args:
            what: the number that is not finite on some rank, in words.
            value: [], this rank's.
            step: optimizer steps taken before.
            batch: the prompts.
            rollout: their rollout, with advantages; None in fine-tuning.

        Raises:
            SampleError: it is one too many; the error holds this rank's batch.
        """
        values = gather_over_ranks(value.item())
        bad = [number for number, found in enumerate(values) if not torch.isfinite(torch.tensor(found))]
        # The norm of the gradient is one number over all ranks.
        where = f" on rank {bad[0]} of {len(values)}" if 0 < len(bad) < len(values) else ""
        message = f"{what} is {values[bad[0]] if bad else 'too large to be summed'}{where} at step {step}"
        if self.in_a_row >= self.max_skipped:
            after = f", after {self.in_a_row} skipped steps in a row" if self.in_a_row else ""
            raise sample_error(f"{message}{after}: the weights are as before; {_FIX}", step, batch, rollout)
        self.in_a_row += 1
        rank_zero_warn(
            f"{message}: this step changes nothing (model.optimizer.max_skipped: {self.in_a_row} of "
            f"{self.max_skipped} in a row)"
        )


def finite_on_all_ranks(value: Tensor) -> bool:
    """Whether a number is finite on every rank; every rank gets the same answer.

    Args:
        value: [], this rank's.
    """
    return bool(torch.isfinite(sum_over_ranks(value.detach())))


def sample_error(message: str, step: int, batch: PromptBatch, rollout: Rollout | None) -> SampleError:
    """The error that holds the whole batch: `Rollout(**tensors)` is the rollout again, seeds included.

    Every rank raises it. Where groups were dealt out over the ranks, positions are those of the rollout's
    rows, and the prompts are there as tokens only.

    Args:
        message: what happened.
        step: optimizer steps taken before.
        batch: the prompts.
        rollout: their rollout, with advantages; None: the tensors are those of the prompts.
    """
    held = batch if rollout is None else rollout
    tensors = {f.name: value for f in fields(held) if isinstance(value := getattr(held, f.name), Tensor)}
    sample: dict[str, Any] = {"step": step, "update": batch.update}
    if rollout is None or rollout.positions is None:
        prompts = [problem.prompt for problem in batch.problems]
        sample |= {"positions": batch.positions.tolist(), "prompts": prompts}
    else:
        sample["positions"] = rollout.positions.tolist()
    for name in ("completion_ids", "advantages"):
        if name in tensors:
            sample[name] = tensors[name].tolist()
    error = SampleError(message, sample, tensors)
    error.on_all_ranks = True
    return error
