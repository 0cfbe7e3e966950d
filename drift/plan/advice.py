"""What to change where a run does not fit: every change planned again, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from drift.plan.memory import plan_memory, usable_bytes
from drift.plan.settings import PlanSettings

# What adapters are planned with; the default of model.lora.rank.
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Option:
    """One change of the settings."""

    flags: str  # as on the command line
    cost: str  # what it costs, in words
    weight: int  # how unwelcome it is: the smallest change has the smallest sum
    settings: PlanSettings  # with the change made

    @property
    def peak(self) -> int:
        """Peak in bytes with the change made."""
        return plan_memory(self.settings).peak


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Several changes together."""

    flags: tuple[str, ...]
    settings: PlanSettings

    @property
    def peak(self) -> int:
        """Peak in bytes with all changes made."""
        return plan_memory(self.settings).peak


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What would help."""

    options: tuple[Option, ...]  # each alone, the one that saves most first
    smallest: Combination | None  # the fewest changes that fit; None: all together are not enough


def advice(settings: PlanSettings, gpu_memory: int) -> Advice:
    """What to change so that a run fits.

    Args:
        settings: of the run.
        gpu_memory: bytes of a GPU; the reserve is left free.
    """
    alone = [option for make in _OPTIONS for option in list(make(settings))[-1:]]
    peak = plan_memory(settings).peak
    helpful = sorted((option for option in alone if option.peak < peak), key=lambda option: option.peak)
    return Advice(options=tuple(helpful), smallest=_smallest(settings, usable_bytes(gpu_memory)))


def _smallest(settings: PlanSettings, usable: int) -> Combination | None:
    """The fewest changes that fit; of equally many the least unwelcome, with the largest batches."""
    for number in range(1, len(_OPTIONS) + 1):
        found = []
        for chosen in combinations(_OPTIONS, number):
            fitting = (option for option in _together(settings, chosen) if option[1].peak <= usable)
            found += [(weight, combination) for weight, combination in fitting]
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    return None


def _together(settings: PlanSettings, makers: tuple[_Maker, ...]) -> Iterator[tuple[int, Combination]]:
    """Every way to make some changes, one after the other, with how unwelcome it is."""
    if not makers:
        yield 0, Combination(flags=(), settings=settings)
        return
    first, *others = makers
    for option in first(settings):
        for weight, rest in _together(option.settings, tuple(others)):
            yield (
                weight + option.weight,
                Combination(flags=(option.flags, *rest.flags), settings=rest.settings),
            )


def _adapters(settings: PlanSettings) -> Iterator[Option]:
    if settings.lora_rank is None:
        yield Option(
            flags=f"--model.lora.rank {LORA_RANK}"
            + " --model.optimizer.master_weights false" * settings.master_weights,
            cost="trains adapters only",
            weight=800,
            settings=replace(settings, lora_rank=LORA_RANK, lora_targets=None, master_weights=False),
        )


def _half(settings: PlanSettings) -> Iterator[Option]:
    if settings.weight_bytes == 2:
        return
    # Adapters are float32 anyway: it is the frozen weights that become smaller.
    masters = settings.lora_rank is None
    yield Option(
        flags="--model.dtype bfloat16" + " --model.optimizer.master_weights true" * masters,
        cost="gradients in bfloat16" if masters else "frozen weights in bfloat16",
        weight=400,
        settings=replace(settings, dtype="bfloat16", master_weights=masters),
    )


def _shards(settings: PlanSettings) -> Iterator[Option]:
    if settings.num_gpus > 1 and not settings.sharded:
        yield Option(
            flags="--config strategy/fsdp",
            cost=f"1/{settings.num_gpus} of the weights on each GPU",
            weight=300,
            settings=replace(settings, strategy="drift.strategy.ShardedStrategy"),
        )


def _gathering(settings: PlanSettings) -> Iterator[Option]:
    if settings.sharded and settings.gather_for_rollout:
        yield Option(
            flags="--model.gather_for_rollout false",
            cost="same result, each pass of a rollout gathers the weights",
            weight=250,
            settings=replace(settings, gather_for_rollout=False),
        )


def _recomputation(settings: PlanSettings) -> Iterator[Option]:
    if not settings.activation_checkpointing:
        yield Option(
            flags="--model.activation_checkpointing true",
            cost="same result, one forward pass more",
            weight=200,
            settings=replace(settings, activation_checkpointing=True),
        )


def _no_average(settings: PlanSettings) -> Iterator[Option]:
    if settings.average:
        yield Option(
            flags="--model.optimizer.ema_decay 0",
            cost="no average of the weights",
            weight=350,
            settings=replace(settings, average=False),
        )


def _no_reference(settings: PlanSettings) -> Iterator[Option]:
    if settings.beta > 0:
        yield Option(
            flags="--model.loss.beta 0",
            cost="no KL to a reference",
            weight=600,
            settings=replace(settings, beta=0.0),
        )


def _micro_batches(settings: PlanSettings) -> Iterator[Option]:
    for halvings, size in enumerate(_halves(settings.num_states), start=1):
        yield Option(
            flags=f"--model.micro_batch_size {size}",
            cost="same result, more passes",
            weight=100 + halvings,
            settings=replace(settings, micro_batch_size=size),
        )


def _rollout_batches(settings: PlanSettings) -> Iterator[Option]:
    rows = settings.rows_decoded
    for halvings, size in enumerate(_halves(rows), start=1):
        yield Option(
            flags=f"--rollout.batch_size {size}",
            cost="same result, more passes",
            weight=100 + halvings,
            settings=replace(settings, rollout_batch_size=size),
        )


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


_Maker = Callable[[PlanSettings], Iterator[Option]]
# In the order in which they are made together: with adapters half precision needs no master weights.
_OPTIONS: tuple[_Maker, ...] = (
    _adapters,
    _half,
    _shards,
    _gathering,
    _recomputation,
    _no_average,
    _no_reference,
    _micro_batches,
    _rollout_batches,
)
