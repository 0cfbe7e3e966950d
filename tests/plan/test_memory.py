from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from drift.contract import ConfigError
from drift.models import LoRAConfig
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig, build_optimizer
from drift.plan import PlanSettings, plan_memory, policy_sizes
from drift.plan.memory import GIB, usable_bytes
from drift.plan.sizes import sizes_of
from drift.rollout import DenoiseConfig

# Embedding, head, two blocks of seven matrices and two norms, last norm: see test_sizes.py.
MATRICES, NORMS = 2 * 48 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64), 5 * 32
NUM = MATRICES + NORMS


@pytest.fixture
def settings(make_policy) -> PlanSettings:
    decode = DenoiseConfig(block_length=16)
    return PlanSettings(
        policy=sizes_of(make_policy(), "here"),
        micro_batch_size=2,
        max_prompt_length=32,
        completion_length=32,
        prompts_per_step=4,
        group_size=2,
        evaluation_batch_size=1,
        decode=decode,
        evaluation=decode,
    )


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "master_weights": True},
        {"average": True},
        {"dtype": "bfloat16", "master_weights": True, "average": True},
        {"lora_rank": 3},
        {"dtype": "bfloat16", "lora_rank": 4, "lora_targets": ("q_proj", "ff_out")},
    ],
    ids=["float32", "bfloat16", "master weights", "average", "both", "adapters", "some adapters on bfloat16"],
)
def test_parameters_gradients_and_optimizer_are_those_of_a_run(tiny_folder, changes: dict):
    """After one real optimizer step, to the byte."""
    settings = PlanSettings(policy=policy_sizes(tiny_folder), **changes)
    decay = 0.9 if settings.average else 0.0
    config = OptimizerConfig(master_weights=settings.master_weights, ema_decay=decay)
    lora = None
    if settings.lora_rank is not None:
        targets = None if settings.lora_targets is None else list(settings.lora_targets)
        lora = LoRAConfig(rank=settings.lora_rank, targets=targets)
    module = RLDFModule(str(tiny_folder), dtype=settings.dtype, optimizer=config, lora=lora)
    module.configure_model()
    optimizer = build_optimizer(module, config)
    parameters = list(module.policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plan = plan_memory(settings)
    assert plan.parameters == nbytes(parameters)
    assert plan.gradients == nbytes(p.grad for p in trained)
    state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim() > 0]
    assert plan.optimizer == nbytes(state)


def test_states_of_training_worked_by_hand(settings: PlanSettings):
    plan = plan_memory(settings)
    assert (plan.parameters, plan.gradients, plan.optimizer) == (4 * NUM, 4 * NUM, 8 * NUM)
    assert (plan.gradient_buckets, plan.reference, plan.old_weights) == (0, 0, 0)
    assert (plan.cast_update, plan.cast_rollout, plan.gathered_update, plan.gathered_rollout) == (0, 0, 0, 0)
    # The square roots of a whole group at once.
    assert plan.step_temporaries == 4 * MATRICES


def test_bfloat16_with_master_weights_worked_by_hand(settings: PlanSettings):
    plan = plan_memory(replace(settings, dtype="bfloat16", master_weights=True, beta=0.1))
    assert (plan.parameters, plan.gradients, plan.reference) == (2 * NUM, 2 * NUM, 2 * NUM)
    # Master weight and two moments, 4 bytes each.
    assert plan.optimizer == 12 * NUM
    # One parameter at a time; the largest are 64 x 32.
    assert plan.step_temporaries == 12 * 64 * 32
    plain = plan_memory(replace(settings, dtype="bfloat16"))
    assert plain.optimizer == 4 * NUM


def test_adapters_worked_by_hand(settings: PlanSettings):
    plan = plan_memory(replace(settings, lora_rank=2, dtype="bfloat16", beta=0.1, num_updates=2))
    # Rank 2: per block 2 x (4 x (32 + 32) + 3 x (32 + 64)), in float32.
    adapters = 2 * 2 * (4 * 64 + 3 * 96)
    assert plan.parameters == 2 * NUM + 4 * adapters
    assert (plan.gradients, plan.optimizer, plan.old_weights) == (4 * adapters, 8 * adapters, 4 * adapters)
    assert plan.reference == 0
    some = plan_memory(replace(settings, lora_rank=2, lora_targets=("q_proj",)))
    assert some.gradients == 4 * 2 * 2 * 64


def test_the_reference_and_old_weights_are_there_where_they_are_needed(settings: PlanSettings, make_policy):
    small = sizes_of(make_policy(n_layers=1), "there")
    assert plan_memory(replace(settings, beta=0.1)).reference == 4 * NUM
    assert plan_memory(replace(settings, beta=0.1, reference=small)).reference == 4 * small.num_parameters
    assert plan_memory(replace(settings, num_updates=2)).old_weights == 4 * NUM


def test_mixed_precision_keeps_copies_of_linear_weights(settings: PlanSettings):
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    plan = plan_memory(replace(settings, precision="bf16-mixed"))
    assert plan.cast_update == 2 * linear
    assert plan.cast_rollout == 2 * (linear + 48 * 32)
    assert plan_memory(replace(settings, precision="bf16-mixed", dtype="bfloat16")).cast_update == 0
    # Frozen weights: the graph keeps copies, a rollout doesn't.
    frozen = plan_memory(replace(settings, precision="bf16-mixed", lora_rank=2))
    assert (frozen.cast_update, frozen.cast_rollout) == (2 * linear, 0)


def test_replicated_ranks_hold_everything_and_buckets(settings: PlanSettings):
    one, two = plan_memory(settings), plan_memory(replace(settings, num_gpus=2, strategy="ddp"))
    assert (two.parameters, two.gradients, two.optimizer) == (one.parameters, one.gradients, one.optimizer)
    assert two.gradient_buckets == 4 * NUM
    assert two.update_peak == one.update_peak + 4 * NUM


def test_sharded_ranks_hold_their_rows(settings: PlanSettings):
    sharded = replace(settings, num_gpus=4, strategy="ShardedStrategy", beta=0.1)
    plan = plan_memory(sharded)
    # All sizes are multiples of four.
    assert (plan.parameters, plan.gradients, plan.optimizer) == (NUM, NUM, 2 * NUM)
    assert (plan.reference, plan.gradient_buckets, plan.step_temporaries) == (NUM, 0, MATRICES)
    assert plan.gathered_rollout == 4 * NUM
    block, outside = 4 * 32 * 32 + 3 * 32 * 64 + 64, 2 * 48 * 32 + 32
    assert plan.gathered_update == 4 * (3 * block + 2 * outside)
    passing = plan_memory(replace(sharded, gather_for_rollout=False))
    assert passing.gathered_rollout == 4 * (2 * block + outside)
    # Gathered in bfloat16, reduced in float32; nothing is cast any more.
    mixed = plan_memory(replace(sharded, precision="bf16-mixed"))
    assert (mixed.parameters, mixed.cast_update, mixed.cast_rollout) == (NUM, 0, 0)
    assert mixed.gathered_rollout == 2 * NUM
    assert mixed.gathered_update == 2 * (3 * block + 2 * outside) + 4 * block


def test_rows_that_cannot_be_shared_evenly_are_counted_for_the_fullest_rank(make_policy):
    sizes = sizes_of(make_policy(vocab_size=50), "here")
    plan = plan_memory(PlanSettings(policy=sizes, num_gpus=4, strategy="ShardedStrategy"))
    # 50 rows: 13 on the first rank, of embedding and head.
    assert plan.parameters == 4 * (NUM - 2 * 48 * 32) // 4 + 4 * 2 * 13 * 32


def test_the_cache_holds_keys_and_values_of_prefix_and_window(settings: PlanSettings):
    assert plan_memory(settings).cache == 0
    cached = replace(settings.decode, use_cache=True)
    plan = plan_memory(replace(settings, decode=cached))
    # 2 x 2 layers x 32 wide x (32 + 32) positions, the window's too, x 8 rows, float32.
    assert plan.cache == 2 * 2 * 32 * 64 * 8 * 4
    half = plan_memory(replace(settings, decode=cached, rollout_batch_size=4, precision="bf16-mixed"))
    assert half.cache == plan.cache // 4
    shared = plan_memory(replace(settings, decode=cached, num_gpus=2))
    assert shared.cache == plan.cache // 2


def test_logits_of_a_rollout_are_bounded_by_its_own_chunk(settings: PlanSettings):
    # 512 rows x 16 positions are more than the 256 that are expanded at once; one and a half copies, greedy.
    many = replace(settings, prompts_per_step=256)
    assert plan_memory(many).head_rollout == 1.5 * 4 * 256 * 48
    assert plan_memory(settings).head_rollout == 1.5 * 4 * 8 * 16 * 48


def test_evaluation_counts_where_it_needs_more(settings: PlanSettings):
    more = replace(settings, evaluation_batch_size=64)
    assert plan_memory(more).rollout_peak > plan_memory(settings).rollout_peak
    assert plan_memory(replace(more, rollout_batch_size=8)).rollout_peak == plan_memory(settings).rollout_peak


def test_the_moments_add_up(settings: PlanSettings):
    plan = plan_memory(replace(settings, beta=0.1, num_updates=2))
    states = (4 + 8 + 4 + 4) * NUM
    assert plan.resident == states
    work = plan.activations + plan.head_update + plan.working_update
    assert plan.update_peak == states + 4 * NUM + work
    assert plan.step_peak == states + 4 * NUM + plan.step_temporaries
    assert plan.rollout_peak == states + plan.head_rollout + plan.working_rollout
    assert plan.peak == max(plan.update_peak, plan.step_peak, plan.rollout_peak)


def test_recomputed_blocks_keep_their_inputs_only(settings: PlanSettings):
    whole = plan_memory(settings)
    plan = plan_memory(replace(settings, activation_checkpointing=True))
    # Two blocks' inputs of 2 states x 64 positions, float32; what surrounds the blocks is kept as before.
    inputs = 2 * 2 * 64 * 32 * 4
    assert 0 < plan.activations - inputs < whole.activations - 2 * inputs
    assert plan.update_peak < whole.update_peak


def test_the_reserve_is_left_free(settings: PlanSettings):
    assert usable_bytes(80 * GIB) == 75 * GIB
    plan = plan_memory(settings)
    least = int((plan.peak + GIB) / 0.95)
    assert plan.fits(least + 2)
    assert not plan.fits(least - 2)


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_an_8b_policy_needs_what_the_readme_says(num_gpus: int, known_8b: Callable[..., PlanSettings]):
    plan = plan_memory(known_8b(num_gpus=num_gpus))
    # 32 GB of weights, of gradients and of the reference, 64 of the optimizer.
    states = plan.parameters + plan.gradients + plan.reference + plan.optimizer
    assert states == 20 * 8_015_581_184
    # 2 x 32 layers x 4096 wide x 1280 positions x rows, bfloat16.
    assert plan.cache == 2 * 32 * 4096 * 1280 * (32 if num_gpus == 1 else 16) * 2


def test_no_more_noisy_states_are_planned_than_there_are(settings: PlanSettings):
    many = replace(settings, micro_batch_size=64, prompts_per_step=8, num_gpus=8, group_size=4)
    assert many.num_states == 64
    # One prompt a rank, four completions, four states of each.
    assert replace(many, states_per_row=4).num_states == 16
    assert replace(many, states_per_row=4, train_groups=12).num_states == 32
    assert replace(many, states_per_row=4, micro_batch_size=3).num_states == 3


def test_a_budget_of_positions_bounds_the_noisy_states_of_a_micro_batch(settings: PlanSettings):
    length = settings.length
    bounded = replace(settings, micro_batch_size=64, micro_batch_tokens=3 * length + 1)
    assert plan_memory(bounded).activations == plan_memory(replace(settings, micro_batch_size=3)).activations
    assert replace(settings, micro_batch_size=64, micro_batch_tokens=1).num_states == 1
    assert replace(settings, micro_batch_size=2, micro_batch_tokens=100 * length).num_states == 2
    with pytest.raises(ConfigError, match="micro_batch_tokens is 0"):
        replace(settings, micro_batch_tokens=0)
