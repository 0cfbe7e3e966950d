from collections.abc import Callable
from dataclasses import replace

import pytest

from drift.plan import PlanSettings, advice, plan_memory
from drift.plan.memory import GIB, usable_bytes


def flags(settings: PlanSettings, gib: float) -> tuple[str, ...]:
    found = advice(settings, int(gib * GIB)).smallest
    assert found is not None
    # What is advised fits when it is planned again.
    assert plan_memory(found.settings).peak == found.peak <= usable_bytes(int(gib * GIB))
    return found.flags


def test_options_are_planned_again_and_ordered_by_what_they_save(known_8b: Callable[..., PlanSettings]):
    settings = known_8b(num_gpus=8)
    options = advice(settings, 80 * GIB).options
    peaks = [option.peak for option in options]
    assert peaks == sorted(peaks)
    assert peaks[-1] < plan_memory(settings).peak
    by_name = {option.flags: option for option in options}
    assert plan_memory(replace(settings, lora_rank=16)).peak == by_name["--model.lora.rank 16"].peak
    half = by_name["--model.dtype bfloat16 --model.optimizer.master_weights true"]
    assert plan_memory(replace(settings, dtype="bfloat16", master_weights=True)).peak == half.peak
    assert plan_memory(replace(settings, beta=0.0)).peak == by_name["--model.loss.beta 0"].peak
    recomputed = by_name["--model.activation_checkpointing true"]
    assert plan_memory(replace(settings, activation_checkpointing=True)).peak == recomputed.peak
    small = by_name["--model.micro_batch_size 1"]
    assert plan_memory(replace(settings, micro_batch_size=1)).peak == small.peak
    assert by_name["--config strategy/fsdp"].settings.sharded


def test_an_average_can_be_left_out(known_8b: Callable[..., PlanSettings]):
    settings = known_8b(num_gpus=1)
    by_name = {option.flags: option for option in advice(replace(settings, average=True), 80 * GIB).options}
    assert by_name["--model.optimizer.ema_decay 0"].peak == plan_memory(settings).peak
    assert "--model.optimizer.ema_decay 0" not in [
        found.flags for found in advice(settings, 80 * GIB).options
    ]


def test_the_fewest_changes_win(known_8b: Callable[..., PlanSettings]):
    settings = known_8b(num_gpus=1)
    assert flags(settings, 70) == ("--model.lora.rank 16", "--model.micro_batch_size 2")
    # No single change is enough there, and one is where there is more room.
    assert all(option.peak > usable_bytes(70 * GIB) for option in advice(settings, 70 * GIB).options)
    assert flags(settings, 80) == ("--model.lora.rank 16",)
    assert flags(settings, 185) == ("--model.dtype bfloat16 --model.optimizer.master_weights true",)


def test_of_equally_many_changes_the_least_unwelcome_wins(known_8b: Callable[..., PlanSettings]):
    settings = known_8b(num_gpus=1)
    room = (plan_memory(settings).peak - 1 + GIB) / 0.95 / GIB
    # One byte too much: half the micro-batch is enough, and nothing of the method changes.
    assert flags(settings, room) == ("--model.micro_batch_size 2",)


def test_adapters_need_no_master_weights(known_8b: Callable[..., PlanSettings]):
    settings = known_8b(num_gpus=1)
    together = flags(settings, 32)
    assert "--model.lora.rank 16" in together
    assert "--model.dtype bfloat16" in together
    half = replace(settings, dtype="bfloat16", master_weights=True)
    options = [option.flags for option in advice(half, 32 * GIB).options]
    assert "--model.lora.rank 16 --model.optimizer.master_weights false" in options


def test_sharding_is_a_way_out(known_8b: Callable[..., PlanSettings]):
    assert flags(known_8b(num_gpus=8), 80) == ("--config strategy/fsdp",)


def test_where_the_whole_policy_is_too_much_passes_gather_its_blocks(known_8b: Callable[..., PlanSettings]):
    settings = known_8b(
        num_gpus=8,
        strategy="drift.strategy.ShardedStrategy",
        activation_checkpointing=True,
        micro_batch_size=1,
    )
    options = {option.flags: option for option in advice(settings, 24 * GIB).options}
    assert not options["--model.gather_for_rollout false"].settings.gather_for_rollout
    # Also where it takes sharding first.
    assert {"--config strategy/fsdp", "--model.gather_for_rollout false"} <= set(
        flags(replace(settings, strategy="auto"), 30)
    )
    once = replace(settings, gather_for_rollout=False)
    assert "--model.gather_for_rollout false" not in [o.flags for o in advice(once, 24 * GIB).options]


def test_what_is_done_already_is_not_advised(known_8b: Callable[..., PlanSettings]):
    settings = known_8b(
        num_gpus=1, dtype="bfloat16", lora_rank=8, activation_checkpointing=True, micro_batch_size=1, beta=0.0
    )
    found = advice(settings, 20 * GIB)
    assert [option.flags for option in found.options] == ["--rollout.batch_size 1"]


def test_nothing_helps_where_the_weights_alone_are_too_much(known_8b: Callable[..., PlanSettings]):
    assert advice(known_8b(num_gpus=1), 12 * GIB).smallest is None


@pytest.mark.parametrize("micro", [1, 4])
def test_small_batches_cannot_be_halved(known_8b: Callable[..., PlanSettings], micro: int):
    options = advice(known_8b(num_gpus=1, micro_batch_size=micro), 80 * GIB).options
    assert any("micro_batch_size" in option.flags for option in options) is (micro > 1)
