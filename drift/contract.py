"""The data that crosses rooms: what each stage hands to the next.

Shape letters, used everywhere in drift:
    B prompts, N rollouts (prompts x group), P prompt length, C completion length, L = P + C,
    S denoising timesteps of a rollout, K timesteps of a plan,
    M noisy states (rollout x timestep) of a masked batch, R reward parts, V vocabulary, D width.

A *timestep* is a denoising step of a rollout, a *step* is an optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor


class ConfigError(ValueError):
    """A setting or an input that cannot work: the message names the key, the value and the fix."""


def require(settings: object, good: bool, key: str, fix: str) -> None:
    """Raises ConfigError, with the key, its value and the fix, unless a setting is good.

    Args:
        settings: the object whose attribute `key` is.
        good: whether the value can work.
        key: name of the setting.
        fix: what to set it to.
    """
    if not good:
        raise ConfigError(f"{key} is {getattr(settings, key)!r}: {fix}")


# How a position was committed: by a rule that leaves no choice; by a draw of its own; or alone, as the surest
# of its block, which commits whatever its own draw says where no other does.
CERTAIN, DRAWN, SUREST = 0, 1, 2


class StorageError(RuntimeError):
    """A checkpoint could not be written: the message names the path, the reason and what is kept."""


class SampleError(RuntimeError):
    """Training met a sample that it cannot go on with; `sample` holds what is needed to look at it.

    Args:
        message: what happened, and what to do about it.
        sample: JSON-serialisable description of the sample that caused it.
        tensors: what is needed to compute the step again, by name.
    """

    def __init__(
        self, message: str, sample: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(message)
        self.sample = dict(sample)
        self.tensors = dict(tensors or {})
        self.on_all_ranks = False  # whether every rank raises one at this place


class HungError(SampleError):
    """A reward did not come back; threads of its may still run, and the interpreter would wait for them."""


class TrainingStopped(RuntimeError):
    """Training was ended by what its figures said; the checkpoints are written and the message says why."""


@dataclass(kw_only=True, slots=True)
class Problem:
    """One problem: what the policy is asked, and what its reward needs to judge the answer."""

    prompt: str  # the question as text, before the chat template
    answer: str  # ground truth, in the form the task's reward expects
    demonstration: str | None = None  # a worked completion, for supervised fine-tuning
    answer_prefix: str = ""  # what the answer starts with; the policy goes on from there
    row: Mapping[str, Any] = field(default_factory=dict)  # the dataset row it was made from


@dataclass(kw_only=True, slots=True)
class PromptBatch:
    """Prompts of one step (or of one evaluation batch), left-padded."""

    prompt_ids: Tensor  # [B,P] int64, left-padded
    prompt_mask: Tensor  # [B,P] bool, False at padding
    problems: list[Problem]  # [B]
    positions: Tensor  # [B] int64, the prompt's place in its stream or dataset: it keys every random draw
    update: int = 0  # which update of this rollout is due: 0 is the first
    completion_ids: Tensor | None = None  # [B,C] int64, demonstrations, right-padded; fine-tuning only
    rollout: Rollout | None = None  # attached by the rollout callback
    refills: list[PromptBatch] = field(default_factory=list)  # further rounds of the step, rolled out
    grid: list[Rollout] = field(default_factory=list)  # in evaluation: one for each cell of the grid


@dataclass(kw_only=True, slots=True)
class Rollout:
    """Completions and the denoising feedback they left."""

    prompt_ids: Tensor  # [N,P] int64, left-padded
    prompt_mask: Tensor  # [N,P] bool, False at padding
    completion_ids: Tensor  # [N,C] int64
    completion_mask: Tensor  # [N,C] bool, True at valid tokens: neither padding nor mask
    step_map: Tensor  # [N,C] int64, the row's own timestep that committed the position; S where never decoded
    token_probs: Tensor | None = None  # [N,C] float32, probability of the token when it was committed
    commit_probs: Tensor | None = None  # [N,C] float32, what token_probs was at the rollout; never refreshed
    num_timesteps: Tensor | None = None  # [N] int64, the row's timesteps that committed something: its S
    commit_kind: Tensor | None = None  # [N,C] int64: CERTAIN, DRAWN or SUREST; None: all are CERTAIN
    commit_rule: Tensor | None = None  # [N,2] float32, threshold and width of the draws of commits
    block_length: int = 0  # positions of a block; 0: unknown
    num_forwards: int = 0  # forward passes of the policy that the rollout took
    scores: Tensor | None = None  # [N,R] float32, what each reward part gave, the task's own first
    reward_names: tuple[str, ...] = ()  # [R] what the parts are logged as
    rewards: Tensor | None = (
        None  # [N,R] float32, the parts by their weights; their sum is the training reward
    )
    correct: Tensor | None = None  # [N] bool, by the task's own reward
    advantages: Tensor | None = None  # [N] float32
    trained: Tensor | None = None  # [N] bool, rows to train on; None: all
    seeds: Tensor | None = None  # [N] int64, key of every random draw made for the row
    positions: Tensor | None = None  # [N] int64, place of the row's prompt; known once groups were dealt out
    finished: Tensor | None = (
        None  # [N] bool, an end token or padding stands in the completion; evaluation only
    )
    seconds: float = 0.0  # that generating took

    def select(self, rows: Tensor) -> Rollout:
        """The rollout of some rows.

        Args:
            rows: [n] int64 row indices, or [N] bool.
        """
        picked = {
            f.name: value[rows] for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **picked)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLevel:
    """How the noisy states of a row make one likelihood of its whole completion.

    The mean over the states of weight times the sum of the scored log-probabilities is a lower bound of it,
    per token of the completion.
    """

    omega: float = 0.0  # share of the upper bound where the advantage is negative, in [0,1]
    beta: float = 1.0  # >= 1, of the upper bound
    whole_ratio: bool = False  # whether a ratio of likelihoods is that of whole completions, not of a token


@dataclass(kw_only=True, slots=True)
class TimestepPlan:
    """Which noisy states to learn from: the timestep sampler's choice."""

    masked: Tensor  # [K,N,C] bool, positions re-masked in the noisy state, padding included
    current: Tensor  # [K,N,C] bool, positions committed at that very timestep
    weight: Tensor  # [K,N] float32, of the noisy state in the estimate; 0 where the row has no such timestep
    replay: bool = False  # whether the policy saw these very states when it committed the current positions
    current_only: bool = False  # whether the current tokens alone are learned from
    num_timesteps: Tensor | None = None  # [N] int64, timesteps that the row's draws stand for; None: one
    sequence: SequenceLevel | None = None  # None: the loss is one of tokens


@dataclass(kw_only=True, slots=True)
class MaskedBatch:
    """Noisy states ready for one forward pass: the rows of a plan whose weight is not 0."""

    input_ids: Tensor  # [M,P+C] int64, prompt and noisy completion
    attention_mask: Tensor  # [M,P+C] bool, False at prompt padding
    targets: Tensor  # [M,C] int64, the clean completion
    scored: Tensor  # [M,C] bool, masked and valid: the positions whose log-probability counts
    current: Tensor  # [M,C] bool, scored and committed at this very timestep
    weight: Tensor  # [M] float32, the plan's weight, > 0
    row_share: Tensor  # [M] float32, 1 / number of noisy states of the same row
    slot: Tensor  # [M] int64 in [0,K), which of the plan's K draws this is
    row: Tensor  # [M] int64 in [0,N), which rollout this is
    advantages: Tensor  # [M] float32
    num_slots: int  # K of the plan, counted up to the last draw that has a state
    commit_logp: Tensor | None = None  # [M,C] float32 nats, the rollout's, at `current`; 0 elsewhere
    num_timesteps: Tensor | None = None  # [M] float32, timesteps that the row's draws stand for; None: one
    # [M,C] int64, what a draw decided: 1 commit, -1 stay masked, 0 there was no draw; None: there were none
    decision: Tensor | None = None
    commit_rule: Tensor | None = None  # [M,2] float32, threshold and width of the draws of commits
    length: Tensor | None = None  # [M] float32, valid tokens of the row's completion; None: unknown
    sequence: SequenceLevel | None = None  # the plan's

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, states: Tensor) -> MaskedBatch:
        """Some of the noisy states.

        Args:
            states: [m] int64 state indices.
        """
        picked = {
            f.name: value[states] for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **picked)


@dataclass(kw_only=True, slots=True)
class TokenLogProbs:
    """What one model says of the scored tokens of a masked batch."""

    logp: Tensor  # [M,C] float32 nats, 0 where not scored
    entropy: Tensor | None = None  # [M,C] float32 nats, 0 where not scored; None where nobody asked
    top: Tensor | None = None  # [M,C] float32 nats, of the likeliest token where a draw decided; 0 elsewhere

    def detach(self) -> TokenLogProbs:
        """The same numbers without their graph."""
        return self._map(Tensor.detach)

    def select(self, states: Tensor) -> TokenLogProbs:
        """Those of some of the noisy states.

        Args:
            states: [m] int64 state indices.
        """
        return self._map(lambda value: value[states])

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenLogProbs:
        entropy = None if self.entropy is None else function(self.entropy)
        top = None if self.top is None else function(self.top)
        return TokenLogProbs(logp=function(self.logp), entropy=entropy, top=top)


@dataclass(kw_only=True, slots=True)
class Mismatch:
    """How far the update's probabilities are from the rollout's, over the tokens that states committed."""

    num_tokens: Tensor  # [] int64, valid tokens committed at the states' own timesteps
    kl: Tensor  # [] float32 nats, sum over them of the estimates of KL(rollout || update)
    weight: Tensor  # [] float32, sum of their importance weights
    num_capped: Tensor  # [] int64, tokens whose weight was cut to the cap
    max_ratio: Tensor  # [] float32 >= 1, largest factor between the two probabilities of a token


@dataclass(kw_only=True, slots=True)
class LossOutput:
    """The loss of some noisy states; its sums over micro-batches and ranks are the whole batch's."""

    loss: Tensor  # [] float32, to be back-propagated
    parts: dict[str, Tensor]  # name -> [] float32, reduced over the kept tokens exactly as the loss is
    share: Tensor  # [] float32, the sum of the kept tokens' factors: with it, parts are means over tokens
    num_kept: Tensor  # [] int64, tokens that the loss was made of
    num_scored: Tensor  # [] int64, masked valid tokens
    mismatch: Mismatch | None = None  # None where the states come without the rollout's probabilities
