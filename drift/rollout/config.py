"""Settings of the denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from drift.contract import ConfigError, require

Score = Literal["confidence", "margin", "neg_entropy", "random"]
BlockOpening = Literal["confidence", "first_token"]
Commit = Literal["threshold", "static", "stochastic"]
CommitBy = Literal["candidate", "top"]

# Where a draw commits, a position's score is its probability times this: above any other, and exactly as
# comparable, for it is a power of two.
DRAWN_FACTOR = 2.0**32
_LEAST_DRAWN = 2.0


@dataclass(frozen=True)
class DenoiseConfig:
    """How a completion is unmasked, block by block (LLaDA, arXiv 2502.09992; Fast-dLLM, arXiv 2505.22618).

    Args:
        block_length: positions of a block; blocks are decoded left to right.
        threshold: dynamic schedule: every masked position whose score reaches it is committed, and where a
            row has none, its best one. In (0, 1]; for `neg_entropy` in nats, <= 0. None: static schedule.
        steps: static schedule: denoising steps of a completion, spread evenly over its blocks, and the
            positions of a block evenly over its steps, remainders first. Not used with a threshold.
        temperature: 0 takes the most likely token, otherwise (1e-3 to 1e3) one is drawn from
            softmax(logits / temperature).
        top_p: sample from the smallest set of tokens that holds this much probability, in (0, 1]; None: all.
        top_k: sample from this many most likely tokens; None: all. With top_p too, which then measures
            probability among these.
        score: what decides which positions are committed: `confidence` (probability of the candidate token),
            `margin` (best minus second best probability), `neg_entropy` (sum of p log p, nats) or `random`.
            Probabilities are those of the untempered, unfiltered softmax over the legal tokens.
        use_cache: keep the keys and values of everything before a block from the pass that opens it.
        horizon: with the cache, positions after the block that the later passes of a block see; None: all.
        dual_cache: with the cache and a horizon, keep what is after the horizon, too (Fast-dLLM's dual cache,
            with horizon 0): later passes see it as it was when the block was opened.
        commit: which masked positions commit: `threshold` and `static` as above, by rule; `stochastic` by
            draws, each position with probability sigmoid((score - threshold) / width), and where no draw of a
            row's succeeds, its best position. Chance makes committing an action with a likelihood, which the
            loss takes in. None: `threshold` where one is set, else `static`.
        width: of the draws of `stochastic`, in units of probability, > 0: how far around the threshold they
            are open.
        commit_by: whose probability the score `confidence` is: that of the `candidate` token, or of the `top`
            one, which says nothing of the candidate, so that drawn tokens stay plain samples of the policy.
            None: `top` for `stochastic`, which needs it, else `candidate`.
        block_opening: what the pass that opens a block commits: `confidence` follows the schedule (LLaDA),
            `first_token` commits the block's first position (Dream).
        stop_at_padding: a row whose finished block is all padding has ended; the rest of it is padding.
        compile: compile the policy's blocks (torch.compile) in the first passes of a run; on CPU it takes a
            C++ compiler.
        interleave: parts of the rows decoded at once that take turns: while the device computes one, the host
            reads what the last pass left of another. None: 1 on CPU, where nothing is waited for, else 2.

    Raises:
        ConfigError: where a value is outside its range.
    """

    block_length: int = 32
    threshold: float | None = 0.9
    steps: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    score: Score = "confidence"
    use_cache: bool = False
    horizon: int | None = None
    dual_cache: bool = False
    commit: Commit | None = None
    width: float = 0.05
    commit_by: CommitBy | None = None
    block_opening: BlockOpening = "confidence"
    stop_at_padding: bool = True
    compile: bool = False
    interleave: int | None = None

    def __post_init__(self) -> None:
        require(self, self.block_length >= 1, "block_length", "set it to 1 or more positions")
        require(self, self.score in get_args(Score), "score", f"choose one of {list(get_args(Score))}")
        require(
            self,
            self.block_opening in get_args(BlockOpening),
            "block_opening",
            f"choose one of {list(get_args(BlockOpening))}",
        )
        require(
            self,
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            "temperature",
            "set it to 0 (most likely token) or a number from 1e-3 to 1e3",
        )
        require(
            self,
            self.top_p is None or 0 < self.top_p <= 1,
            "top_p",
            "set it in (0, 1], or null for no filter",
        )
        require(
            self,
            self.top_k is None or self.top_k >= 1,
            "top_k",
            "set it to 1 or more tokens, or null for no filter",
        )
        require(
            self,
            self.horizon is None or self.horizon >= 0,
            "horizon",
            "set it to 0 or more positions, or null for all",
        )
        require(
            self,
            not self.dual_cache or (self.use_cache and self.horizon is not None),
            "dual_cache",
            "it keeps what is after the horizon: set use_cache to true and horizon to a number, such as 0",
        )
        require(
            self,
            self.interleave is None or self.interleave >= 1,
            "interleave",
            "set it to 1 or more parts, or null for the device's default",
        )
        require(self, self.steps is None or self.steps >= 1, "steps", "set it to 1 or more denoising steps")
        self._require_commit()

    def _require_commit(self) -> None:
        for key, kinds in (("commit", Commit), ("commit_by", CommitBy)):
            good = getattr(self, key) in (None, *get_args(kinds))
            require(self, good, key, f"choose one of {list(get_args(kinds))}, or null for what fits the rest")
        require(
            self,
            self.commit_by is None or self.score == "confidence",
            "commit_by",
            f"it says whose `confidence` the score is, and score is {self.score!r}: set it to null",
        )
        require(self, math.isfinite(self.width) and self.width > 0, "width", "set it above 0, such as 0.05")
        if self.rule == "static":
            kind = "a static schedule (commit: static, or threshold: null)"
            require(self, self.steps is not None, "steps", f"{kind} needs a number")
            return
        require(
            self, self.threshold is not None, "threshold", f"commit: {self.rule} needs a number, such as 0.9"
        )
        if self.rule == "stochastic":
            require(
                self, self.score == "confidence", "score", "commit: stochastic draws by `confidence` alone"
            )
            require(
                self,
                self.commit_by != "candidate",
                "commit_by",
                "with commit: stochastic set it to `top`: the likelihood of positions that stayed masked "
                "would need candidates that nobody kept",
            )
        assert self.threshold is not None
        if self.score == "neg_entropy":
            require(
                self,
                self.threshold <= 0,
                "threshold",
                "scores are negative entropies: set it to 0 or less (nats)",
            )
        else:
            require(
                self, 0 < self.threshold <= 1, "threshold", "set it in (0, 1], or null for a static schedule"
            )

    @property
    def rule(self) -> Commit:
        """`commit`, with its default filled in."""
        return self.commit or ("static" if self.threshold is None else "threshold")

    @property
    def least_score(self) -> float | None:
        """The score from which on a position commits; None: the schedule is static."""
        return {"threshold": self.threshold, "static": None, "stochastic": _LEAST_DRAWN}[self.rule]

    @property
    def draws(self) -> bool:
        """Whether anything is left to chance."""
        return self.temperature > 0 or self.score == "random" or self.rule == "stochastic"

    def require_fits(self, completion_length: int) -> None:
        """Raises ConfigError where a completion of this length cannot be decoded with these settings."""
        if completion_length < 1 or completion_length % self.block_length:
            raise ConfigError(
                f"completion_length is {completion_length}, block_length is {self.block_length}: "
                "the completion length must be a multiple of the block length"
            )
        if self.rule == "static":
            self.quotas(completion_length)

    def quotas(self, completion_length: int) -> list[list[int]]:
        """Static schedule: for every block, the number of positions that each of its steps commits.

        Args:
            completion_length: positions of the completion.

        Raises:
            ConfigError: where there are fewer steps than the blocks need.
        """
        if self.steps is None:
            raise ConfigError(
                f"steps is None: a static schedule of {completion_length} positions needs a number"
            )
        num_blocks = completion_length // self.block_length
        opening = 1 if self.block_opening == "first_token" and self.block_length > 1 else 0
        if self.steps < num_blocks * (1 + opening):
            raise ConfigError(
                f"steps is {self.steps}: {num_blocks} blocks with block_opening {self.block_opening!r} need "
                f"at least {num_blocks * (1 + opening)}; raise steps or block_length"
            )
        spread = _spread(self.steps, num_blocks)
        return [[1] * opening + _spread(self.block_length - opening, steps - opening) for steps in spread]


def _spread(total: int, parts: int) -> list[int]:
    """`total` in `parts` nearly equal whole numbers, the larger ones first."""
    share, extra = divmod(total, parts)
    return [share + (i < extra) for i in range(parts)]
