"""Evaluation: which cells a test is made of, and what the answers of a cell come to.

A cell is an evaluation set at a completion length with decode settings. Its figures are made of its answers
in their order, so that they are the same to the last bit for any batch size and any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, repeat
from typing import Any, NamedTuple

from drift.contract import ConfigError, PromptBatch, Rollout
from drift.distributed import gather_over_ranks
from drift.metrics import clustered_interval, pass_at_k
from drift.rollout import DenoiseConfig


@dataclass(frozen=True)
class GridConfig:
    """What `drift test` evaluates: every set of data.test at every length with all decode settings.

    Args:
        lengths: positions of a completion, each a multiple of every block length; None:
            rollout.evaluation_length.
        decodes: decode settings by name, each complete: what one leaves out has its own default, not the
            value of rollout.evaluation. None: rollout.evaluation, under the name `evaluation`.
        samples: completions of a prompt; with more than one pass@k is reported, and the temperature must not
            be 0.

    Raises:
        ConfigError: where a value is outside its range, or a length doesn't fit.
    """

    lengths: list[int] | None = None
    decodes: dict[str, DenoiseConfig] | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"rollout.test.samples is {self.samples}: set it to 1 or more")
        for key, values in (("lengths", self.lengths), ("decodes", self.decodes)):
            if values is not None and not values:
                raise ConfigError(f"rollout.test.{key} is {values}: give at least one, or null")
        if self.lengths is not None and len(set(self.lengths)) < len(self.lengths):
            raise ConfigError(f"rollout.test.lengths is {self.lengths}: name each length once")

    def cells(self, length: int, decode: DenoiseConfig, seed: int) -> list[Cell]:
        """The cells of each evaluation set, in order.

        Args:
            length: where no lengths are set.
            decode: where no decode settings are.
            seed: of the draws.

        Raises:
            ConfigError: where a length doesn't fit, or several answers would be the same one.
        """
        lengths = [length] if self.lengths is None else self.lengths
        decodes = {"evaluation": decode} if self.decodes is None else self.decodes
        found = [
            Cell(name=name, length=length, decode=decode, samples=self.samples, seed=seed)
            for length in lengths
            for name, decode in decodes.items()
        ]
        for cell in found:
            cell.require_usable()
        return found


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One completion length with one decode setting."""

    name: str  # of the decode settings
    length: int  # positions of a completion
    decode: DenoiseConfig
    samples: int = 1  # completions of a prompt
    seed: int = 0  # of the draws

    @property
    def draws(self) -> bool:
        """Whether chance decides anything."""
        return self.decode.draws

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, in plain values."""
        return {
            "length": self.length,
            "samples": self.samples,
            "seed": self.seed if self.draws else None,
            "decode": asdict(self.decode),
        }

    def require_usable(self) -> None:
        """Raises ConfigError where the length doesn't fit, or several answers would be the same one."""
        try:
            self.decode.require_fits(self.length)
        except ConfigError as error:
            raise ConfigError(f"rollout.test, length {self.length}, decode {self.name!r}: {error}") from error
        if self.samples > 1 and not self.draws:
            raise ConfigError(
                f"rollout.test.samples is {self.samples}: decode {self.name!r} has temperature 0, with which "
                "all completions of a prompt are the same and pass@k says nothing; set its temperature above "
                "0, or samples to 1"
            )


class Answer(NamedTuple):
    """What counts of one completion."""

    position: int  # the prompt's place in its set
    sample: int  # the completion's place among those of its prompt
    correct: bool
    finished: bool
    reward: float
    timesteps: int
    tokens: int  # neither padding nor mask
    scores: tuple[float, ...] = ()  # what each part of the reward gave


def answers_of(batch: PromptBatch, rollout: Rollout) -> Iterator[Answer]:
    """The answers of a rollout that has been judged."""
    assert rollout.rewards is not None
    assert rollout.correct is not None
    assert rollout.finished is not None
    assert rollout.num_timesteps is not None
    assert rollout.scores is not None
    samples = len(rollout.completion_ids) // len(batch.problems)
    places = [(position, sample) for position in batch.positions.tolist() for sample in range(samples)]
    columns = (
        rollout.correct.tolist(),
        rollout.finished.tolist(),
        rollout.rewards.sum(dim=1).tolist(),
        rollout.num_timesteps.tolist(),
        rollout.completion_mask.sum(dim=1).tolist(),
        map(tuple, rollout.scores.tolist()),
    )
    for place, values in zip(places, zip(*columns, strict=True), strict=True):
        yield Answer(*place, *values)


class Tally:
    """Collects the answers of every cell, on this rank."""

    def __init__(self) -> None:
        self.answers: dict[tuple[int, int], list[Answer]] = {}
        self.parts: dict[int, tuple[str, ...]] = {}  # of the reward, by set
        self.seconds: dict[tuple[int, int], float] = {}

    def add(self, set_number: int, batch: PromptBatch) -> None:
        """Adds a batch.

        Args:
            set_number: which evaluation set the prompts are of.
            batch: with a rollout for each cell.
        """
        for number, rollout in enumerate(batch.grid):
            key = (set_number, number)
            self.answers.setdefault(key, []).extend(answers_of(batch, rollout))
            self.parts[set_number] = rollout.reward_names
            self.seconds[key] = self.seconds.get(key, 0.0) + rollout.seconds

    def close(self) -> dict[tuple[int, int], CellResult]:
        """The results by (set, cell), the same on every rank; the tally is empty afterwards."""
        ranks = gather_over_ranks((self.answers, self.seconds, self.parts))
        self.answers, self.seconds, self.parts = {}, {}, {}
        # A rank without rows of a set doesn't know what its reward is made of.
        names = {number: found for *_, parts in ranks for number, found in parts.items()}
        found = {}
        for key in sorted({key for answers, *_ in ranks for key in answers}):
            everyone = sorted(answer for answers, *_ in ranks for answer in answers.get(key, ()))
            slowest = max(seconds.get(key, 0.0) for _, seconds, _ in ranks)
            found[key] = CellResult(answers=everyone, seconds=slowest, reward_names=names[key[0]])
        return found


# What every cell has, and so every validation.
FIGURES = (
    "num",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "reward",
    "timesteps",
    "tokens_per_forward",
    "unfinished",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """All answers of a cell, in order of prompt and sample, and what they come to."""

    answers: Sequence[Answer]
    seconds: float  # generating, on the rank that took longest
    reward_names: tuple[str, ...] = ()  # of the parts of the reward

    @property
    def positions(self) -> list[int]:
        """The prompts' places in their set."""
        return sorted({answer.position for answer in self.answers})

    @property
    def num_correct(self) -> list[int]:
        """Correct answers of each prompt."""
        groups = groupby(self.answers, key=lambda answer: answer.position)
        return [sum(answer.correct for answer in group) for _, group in groups]

    def figures(self) -> dict[str, float]:
        """What the answers come to, by name.

        Returns:
            `num` prompts, `accuracy` with its 95 % interval `accuracy_low` and `accuracy_high`, mean
            `reward`, `timesteps` (mean per answer), `tokens_per_forward` (what a row gets out of a pass that
            it takes part in), `unfinished` (share of answers without end token or padding) and `seconds`;
            where there are several samples also `pass@1`, `pass@2`, `pass@4`, ...; where the reward has
            several parts also the mean of each as `reward/NAME`
        """
        answers, num_correct = self.answers, self.num_correct
        num = len(answers)
        samples = num // len(num_correct)
        low, high = clustered_interval(num_correct, samples)
        timesteps = sum(answer.timesteps for answer in answers)
        figures = {
            "num": len(num_correct),
            "accuracy": sum(num_correct) / num,
            "accuracy_low": low,
            "accuracy_high": high,
            "reward": math.fsum(answer.reward for answer in answers) / num,
            "timesteps": timesteps / num,
            "tokens_per_forward": sum(answer.tokens for answer in answers) / max(timesteps, 1),
            "unfinished": sum(not answer.finished for answer in answers) / num,
            "seconds": self.seconds,
        }
        if len(self.reward_names) > 1:
            for part, name in enumerate(self.reward_names):
                figures[f"reward/{name}"] = math.fsum(answer.scores[part] for answer in answers) / num
        for k in looked_at(samples):
            figures[f"pass@{k}"] = math.fsum(map(pass_at_k, repeat(samples), num_correct, repeat(k))) / len(
                num_correct
            )
        return figures


def looked_at(samples: int) -> list[int]:
    """The k of pass@k: powers of two, and all samples; nothing for one sample, of which accuracy says it."""
    if samples == 1:
        return []
    return [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]


def logged(results: Mapping[tuple[int, int], CellResult], names: Sequence[str], cells: Sequence[Cell]) -> Any:
    """The figures by the names under which they are logged: plain where there is one cell of one set.

    Args:
        results: by (set, cell).
        names: of the sets.
        cells: of the grid.
    """
    values = {}
    for (set_number, number), result in results.items():
        cell = cells[number]
        place = "" if len(names) * len(cells) == 1 else f"{names[set_number]}/{cell.length}/{cell.name}/"
        values |= {f"{place}{name}": float(value) for name, value in result.figures().items()}
    return values
