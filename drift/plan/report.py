"""The memory plan as text: one screen."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from drift.plan.advice import Advice
from drift.plan.memory import CONTEXT_BYTES, FRAGMENTED_SHARE, GIB, MemoryPlan, usable_bytes
from drift.plan.settings import PlanSettings

MIB = GIB // 1024
_TYPES = {2: "bfloat16", 4: "float32"}
_NAME, _NUMBER, _FLAGS = 18, 9, 62


def report(plan: MemoryPlan, gpu_memory: int, found: Advice | None) -> str:
    """The table of a plan, whether it fits, and what to change where it does not.

    Args:
        plan: the memory plan.
        gpu_memory: bytes of a GPU.
        found: advice; None: it fits.
    """
    lines = [*_head(plan.settings), "", *_table(plan), "", *_verdict(plan, gpu_memory)]
    if found is not None:
        lines += ["", *_advice(plan, found)]
    return "\n".join(lines) + "\n"


def _head(settings: PlanSettings) -> Iterator[str]:
    policy, gpus = settings.policy, settings.num_gpus
    strategy = f"trainer.strategy {settings.strategy}"
    spread = "one GPU"
    if settings.sharded:
        spread = f"{gpus} GPUs, 1/{gpus} of the weights on each ({strategy})"
    elif gpus > 1:
        spread = f"{gpus} GPUs, all weights on each ({strategy} does not shard)"
    yield f"memory plan: {_count(policy.num_parameters)} parameters, {spread}"
    yield f"sizes from {policy.source}"


def _table(plan: MemoryPlan) -> Iterator[str]:
    settings = plan.settings
    trained, policy = _TYPES[settings.trained_bytes], settings.policy
    states = f"{settings.num_states} states x {settings.length} positions"
    if settings.activation_checkpointing:
        states += ", the blocks' inputs only"
    gathered = "head and blocks at work" + "; in a rollout all" * settings.gather_for_rollout
    rows: list[tuple[str, tuple[int, int, int], str]] = [
        ("parameters", _always(plan.parameters), _parameters(settings)),
        ("gradients", (plan.gradients, plan.gradients, 0), trained),
        ("gradient buckets", _always(plan.gradient_buckets), "copies that the GPUs exchange"),
        ("optimizer", _always(plan.optimizer), _optimizer(settings)),
        ("reference", _always(plan.reference), f"{_TYPES[settings.weight_bytes]}; model.loss.beta > 0"),
        ("old weights", _always(plan.old_weights), f"{trained}; model.num_updates > 1"),
        ("bfloat16 copies", (plan.cast_update, 0, plan.cast_rollout), "of float32 weights; bf16-mixed"),
        ("gathered weights", (plan.gathered_update, 0, plan.gathered_rollout), gathered),
        ("activations", (plan.activations, 0, 0), states),
        ("rollout cache", (0, 0, plan.cache), "keys and values; use_cache"),
        ("vocabulary chunk", (plan.head_update, 0, plan.head_rollout), f"logits, {policy.vocab_rows} wide"),
        ("working set", (plan.working_update, plan.step_temporaries, plan.working_rollout), _work(settings)),
    ]
    unit = "GiB" if plan.peak >= GIB else "MiB"
    cell = partial(_cell, GIB if plan.peak >= GIB else MIB)
    yield f"{unit + ' on each GPU':<{_NAME}}" + "".join(
        f"{m:>{_NUMBER}}" for m in ("update", "step", "rollout")
    )
    for name, sizes, what in rows:
        if any(sizes):
            yield f"{name:<{_NAME}}{''.join(map(cell, sizes))}  {what}"
    peaks = (plan.update_peak, plan.step_peak, plan.rollout_peak)
    yield f"{'peak':<{_NAME}}{''.join(map(cell, peaks))}  longest prompts, every row still decoding"


def _verdict(plan: MemoryPlan, gpu_memory: int) -> Iterator[str]:
    usable = usable_bytes(gpu_memory)
    reserve = f"{CONTEXT_BYTES / GIB:.0f} GiB and {FRAGMENTED_SHARE:.0%}"
    room = f"usable: {_gib(usable)} of {_gib(gpu_memory)}"
    yield f"{room}; {reserve} are left for the device's context and fragmentation"
    if plan.fits(gpu_memory):
        yield f"FITS: the peak is {_gib(plan.peak)}, {_gib(usable - plan.peak)} to spare"
    else:
        yield f"DOES NOT FIT: the peak is {_gib(plan.peak)}, {_gib(plan.peak - usable)} too much"


def _advice(plan: MemoryPlan, found: Advice) -> Iterator[str]:
    yield f"{'each change alone':<{_FLAGS}}{'saves':>7}{'peak':>8}"
    for option in found.options:
        saved = (plan.peak - option.peak) / GIB
        yield f"  {option.flags:<{_FLAGS - 2}}{saved:>7.1f}{option.peak / GIB:>8.1f}  {option.cost}"
    yield ""
    if found.smallest is None:
        yield "No combination of these fits: use a smaller policy, shorter prompts or larger GPUs."
        return
    yield f"smallest change that fits: peak {_gib(found.smallest.peak)}"
    for flags in found.smallest.flags:
        yield f"  {flags}"


def _always(size: int) -> tuple[int, int, int]:
    return size, size, size


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def _cell(unit: int, size: int) -> str:
    return f"{'-' if size == 0 else format(size / unit, '.1f'):>{_NUMBER}}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _parameters(settings: PlanSettings) -> str:
    adapters = "" if settings.lora_rank is None else f", and adapters of rank {settings.lora_rank}"
    return _TYPES[settings.weight_bytes] + adapters


def _optimizer(settings: PlanSettings) -> str:
    average = "; average of weights" if settings.average else ""
    if settings.master_weights:
        return f"AdamW: two moments and master weights in float32{average}"
    return f"AdamW: two moments in {_TYPES[settings.trained_bytes]}{average}"


def _work(settings: PlanSettings) -> str:
    return f"backward, reference and optimizer; rollout: {settings.rows_decoded} rows"
