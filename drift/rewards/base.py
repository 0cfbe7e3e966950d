"""What a reward is: completions and their problems in, one number each out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from drift.contract import Problem


class Reward(ABC):
    """Judges completions. Settings are the constructor's arguments; no completion may make it raise."""

    @abstractmethod
    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> Tensor:
        """[N] float32 rewards on the CPU.

        Args:
            completions: [N] texts, as the policy wrote them; anything may be in them.
            problems: [N] the problem each completion answers.
        """

    def judge(
        self, completions: Sequence[str], problems: Sequence[Problem], num_tokens: Tensor | None
    ) -> Tensor:
        """[N] float32 rewards of completions whose tokens were counted; most rewards don't look at those.

        Args:
            completions: [N] as above.
            problems: [N] as above.
            num_tokens: [N] int64, valid tokens of each completion; None where nobody counted them.
        """
        return self(completions, problems)

    def vet(self, problems: Iterable[Problem]) -> Iterator[tuple[int, str]]:
        """The number of each problem that no answer could be judged on, and why, as far as can be known.

        Args:
            problems: as they will be judged; those of a dataset, in its order.
        """
        return iter(())

    def close(self) -> None:
        """Gives back what the reward holds, such as processes; it may be called again afterwards."""
        return


class PerSampleReward(Reward):
    """A reward that judges each completion alone, quickly enough to do so in this process."""

    @abstractmethod
    def score(self, completion: str, problem: Problem) -> float:
        """The reward of one completion."""

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> Tensor:
        """[N] float32 rewards on the CPU, one `score` each."""
        pairs = zip(completions, problems, strict=True)
        scores = [self.score(completion, problem) for completion, problem in pairs]
        return torch.tensor(scores, dtype=torch.float32)
