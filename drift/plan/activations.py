"""Bytes that passes through a policy keep and need, counted from what the blocks and the head compute."""

from __future__ import annotations

from dataclasses import dataclass

from drift.plan.settings import PlanSettings
from drift.plan.sizes import PolicySizes
from drift.rollout import DenoiseConfig
from drift.token_scores import tile_width

FULL = 4  # bytes of a float32


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Bytes of a number, by where it stands."""

    residual: int  # residual stream and norms: as the norms' weights
    compute: int  # what linear layers give
    cast: bool  # linear layers compute from bfloat16 copies of float32 weights
    adapter: int | None = None  # what adapters compute in; None: there are none, the weights are trained

    @classmethod
    def of_policy(cls, settings: PlanSettings) -> Numbers:
        """Those of the policy in training."""
        adapter = None
        if settings.lora_rank is not None:
            adapter = 2 if settings.autocast else settings.trained_bytes
        # Sharded weights are cast as they are gathered.
        stored = settings.gathered_bytes if settings.sharded else settings.weight_bytes
        return cls(
            residual=stored,
            compute=settings.compute_bytes,
            cast=settings.autocast and stored == FULL,
            adapter=adapter,
        )

    @classmethod
    def of_reference(cls, settings: PlanSettings) -> Numbers:
        """Those of the frozen reference."""
        size = settings.weight_bytes
        if settings.sharded:
            size = min(size, settings.compute_bytes)
        return cls(
            residual=size,
            compute=2 if settings.autocast else size,
            cast=settings.autocast and size == FULL,
        )


def saved_by_block(sizes: PolicySizes, numbers: Numbers, rank: int = 0, *, padded: bool = True) -> int:
    """What autograd keeps of one block for each position, copies of weights left out.

    Args:
        sizes: of the policy.
        numbers: bytes of a number.
        rank: of the adapters; 0: there are none.
        padded: whether prompts differ in length.
    """
    return saved_before_mixing(sizes, numbers, rank, padded=padded) + saved_after_mixing(sizes, numbers, rank)


def saved_before_mixing(sizes: PolicySizes, numbers: Numbers, rank: int, *, padded: bool) -> int:
    """The part of `saved_by_block` up to what attention mixed, which is needed at all positions."""
    width, compute = sizes.width, numbers.compute
    # Queries, keys, values, the mixture, and the logarithm of each head's normaliser. Prompts of several
    # lengths need a mask, and then grouped keys and values are repeated for every head.
    kv_width = width if padded else sizes.kv_width
    attention = compute * (2 * width + 2 * kv_width + padded) + FULL * sizes.num_heads
    inputs = (1 if _shared(numbers) else 3) * _entering(numbers) * width
    extra = 0 if numbers.adapter is None else numbers.adapter * 3 * rank
    return _saved_by_norm(sizes, numbers) + inputs + attention + extra


def saved_after_mixing(sizes: PolicySizes, numbers: Numbers, rank: int) -> int:
    """The rest of `saved_by_block`, which the last block needs at the scored positions alone."""
    width, compute, entering = sizes.width, numbers.compute, _entering(numbers)
    inputs = (1 if _shared(numbers) else 2) * entering * width
    feed_forward = compute * 2 * sizes.mlp_width + entering * sizes.mlp_width
    extra = 0
    if numbers.adapter is not None:
        # Adapters take a cast copy of the mixture where it is not float32 already.
        extra = numbers.adapter * (4 * rank + (0 if compute == entering == FULL else width))
    return _saved_by_norm(sizes, numbers) + inputs + feed_forward + extra


def _saved_by_norm(sizes: PolicySizes, numbers: Numbers) -> int:
    return numbers.residual * sizes.width + FULL


def _entering(numbers: Numbers) -> int:
    """Bytes of a number that the layers which are trained take in."""
    return numbers.compute if numbers.adapter is None else numbers.adapter


def _shared(numbers: Numbers) -> bool:
    """Whether those layers share what they take in: no cast is needed."""
    entering = _entering(numbers)
    return numbers.residual == entering and (numbers.adapter is None or entering == FULL)


def saved_by_table(sizes: PolicySizes) -> int:
    """What is kept for each position beside the blocks and the last norm: rotary tables and ids."""
    return 2 * FULL * sizes.head_width + 8


def saved_by_last_norm(sizes: PolicySizes, numbers: Numbers) -> int:
    """What the norm after the blocks keeps for each position, its result included."""
    return _saved_by_norm(sizes, numbers) + numbers.residual * sizes.width


def block_backward(sizes: PolicySizes, numbers: Numbers) -> int:
    """What the backward pass of a block needs for each position beside what was saved, at most."""
    # What adapters take in is cast to float32 and back, and so is its gradient.
    casts = numbers.adapter is not None and (numbers.adapter, numbers.compute) != (FULL, FULL)
    return (2 * numbers.compute + FULL * casts) * sizes.mlp_width


def norm_backward(sizes: PolicySizes) -> int:
    """The same of a norm, which is computed in float32."""
    return 5 * FULL * sizes.width


def forward_work(sizes: PolicySizes, numbers: Numbers) -> int:
    """What a pass without graph needs for each position at its peak, in one block."""
    width, kv, residual, compute = sizes.width, sizes.kv_width, numbers.residual, numbers.compute
    table = 2 * FULL * sizes.head_width + 8
    projections = compute * (width + 2 * kv)
    rotation = 3 * FULL if compute == FULL else 4 * FULL
    # Grouped keys and values are repeated for every head where prompts are padded.
    repeated = 2 * compute * width if kv < width else 0
    rotated = max(rotation * width, compute * width + rotation * kv)
    attention = 2 * residual * width + max(rotated, repeated)
    feed_forward = 3 * residual * width + 3 * compute * sizes.mlp_width
    return table + projections + max(attention, feed_forward)


def training_head(sizes: PolicySizes, numbers: Numbers, states: int, *, entropy: bool = False) -> int:
    """Bytes that the head needs at its peak, in the backward pass of one tile of the vocabulary.

    Args:
        sizes: of the policy.
        numbers: bytes of a number.
        states: scored positions in all.
        entropy: whether entropies are computed.
    """
    logits = states * tile_width(states, sizes.vocab_rows)
    copy = 2 * sizes.num_head if numbers.cast else 0
    # Logits, which become their own gradient; in low precision as they come and go, and in float32.
    at_logits = (_of_logit(numbers) + FULL * entropy) * logits
    if numbers.adapter is not None:
        return copy + at_logits
    gradient = numbers.compute * sizes.num_head
    # The copy is gone when its gradient becomes the weight's.
    return gradient + max(copy + at_logits, FULL * sizes.num_head if numbers.cast else 0)


def scoring_head(sizes: PolicySizes, numbers: Numbers, states: int, *, entropy: bool = False) -> int:
    """Bytes that the head needs to score without a graph; see `training_head`."""
    copy = 2 * sizes.num_head if numbers.cast else 0
    logits = states * tile_width(states, sizes.vocab_rows)
    return copy + (_of_logit(numbers) + FULL * entropy) * logits


def _of_logit(numbers: Numbers) -> int:
    return FULL if numbers.compute == FULL else FULL + numbers.compute


def sampling_head(sizes: PolicySizes, config: DenoiseConfig, rows: int, chunk: int) -> int:
    """Bytes that the head and the choice of tokens need for the masked positions of a block.

    Args:
        sizes: of the policy.
        config: temperature and filters.
        rows: rows that are decoded at once.
        chunk: positions that are expanded to the vocabulary at once.
    """
    logits = min(rows * config.block_length, chunk) * sizes.vocab_rows
    if config.temperature == 0 or (config.temperature == 1 and config.top_k is None and config.top_p is None):
        copies = 1.5  # logits, as the head gives them and in float32; all else is made in place
    elif config.top_k is not None:
        copies = 3  # legal logits, probabilities but for a factor, tempered logits
    elif config.top_p is not None:
        copies = 8  # and sorted ones, their 64-bit places, as much again while they are sorted
    else:
        copies = 4.25  # and their probabilities, and sums of groups of them
    if config.score == "neg_entropy":
        copies = max(copies, 2)
    return int(copies * FULL * logits)
