from dataclasses import replace

from drift.plan import advice, plan_memory, report
from drift.plan.memory import GIB


def test_one_screen_holds_it_all(known_8b):
    settings = known_8b(num_gpus=8, num_updates=2)
    text = report(plan_memory(settings), 80 * GIB, advice(settings, 80 * GIB))
    lines = text.splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 116
    assert lines[0].startswith("memory plan: 8.02 billion parameters, 8 GPUs, all weights on each")
    assert "trainer.strategy auto does not shard" in lines[0]
    assert lines[1] == "sizes from the known sizes of GSAI-ML/LLaDA-8B-Instruct, which is not on this machine"


def test_the_columns_add_up_to_the_peaks(known_8b):
    settings = known_8b(num_gpus=8, num_updates=2)
    plan = plan_memory(settings)
    text = report(plan, 80 * GIB, None)
    rows = [line for line in text.split("\n\n")[1].splitlines()[1:] if line]
    numbers = [[0.0 if cell == "-" else float(cell) for cell in row[18:].split()[:3]] for row in rows]
    *parts, peaks = numbers
    for column, peak in enumerate((plan.update_peak, plan.step_peak, plan.rollout_peak)):
        assert abs(sum(part[column] for part in parts) - peaks[column]) < 0.05 * len(parts) + 0.05
        assert peaks[column] == round(peak / GIB, 1)
    names = [row[:18].strip() for row in rows]
    assert names[:4] == ["parameters", "gradients", "gradient buckets", "optimizer"]
    assert {"reference", "activations", "rollout cache", "vocabulary chunk", "working set"} <= set(names)
    # Gradients are gone while a rollout is made.
    assert parts[1][2] == 0


def test_a_run_that_fits_is_told_its_room(known_8b):
    plan = plan_memory(known_8b(lora_rank=16, dtype="bfloat16", micro_batch_size=1))
    text = report(plan, 80 * GIB, None)
    assert "usable: 75.0 GiB of 80.0 GiB; 1 GiB and 5% are left" in text
    assert f"FITS: the peak is {plan.peak / GIB:.1f} GiB, {75 - plan.peak / GIB:.1f} GiB to spare" in text
    assert "each change alone" not in text


def test_a_run_that_does_not_is_told_what_to_change(known_8b):
    settings = known_8b()
    plan = plan_memory(settings)
    text = report(plan, 70 * GIB, advice(settings, 70 * GIB))
    assert f"DOES NOT FIT: the peak is {plan.peak / GIB:.1f} GiB" in text
    lora = next(line for line in text.splitlines() if "--model.lora.rank 16 " in line)
    with_lora = plan_memory(replace(settings, lora_rank=16)).peak
    assert lora.split()[2:4] == [f"{(plan.peak - with_lora) / GIB:.1f}", f"{with_lora / GIB:.1f}"]
    assert text.endswith("  --model.lora.rank 16\n  --model.micro_batch_size 2\n")


def test_where_nothing_helps_it_says_so(known_8b):
    settings = known_8b()
    text = report(plan_memory(settings), 12 * GIB, advice(settings, 12 * GIB))
    assert "No combination of these fits: use a smaller policy" in text


def test_sharding_is_advised_and_shown(known_8b):
    settings = known_8b(num_gpus=8)
    text = report(plan_memory(settings), 80 * GIB, advice(settings, 80 * GIB))
    assert text.endswith("  --config strategy/fsdp\n")
    assert "1/8 of the weights on each GPU" in text
    sharded = replace(settings, strategy="drift.strategy.ShardedStrategy")
    text = report(plan_memory(sharded), 80 * GIB, None)
    assert "8 GPUs, 1/8 of the weights on each" in text
    assert "in a rollout all" in text
    passing = plan_memory(replace(sharded, gather_for_rollout=False))
    assert "in a rollout all" not in report(passing, 80 * GIB, None)
