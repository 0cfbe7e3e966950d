from dataclasses import replace

import pytest

from drift.cli import parsed
from drift.commands import plan_settings
from drift.contract import ConfigError
from drift.plan import PlanSettings
from drift.plan.sizes import sizes_of
from drift.samplers import FullSampler


@pytest.fixture
def settings(make_policy) -> PlanSettings:
    return PlanSettings(policy=sizes_of(make_policy(), "here"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 0}, "model.micro_batch_size is 0: set it to 1 or more"),
        ({"num_updates": 0}, "model.num_updates is 0: set it to 1 or more"),
        ({"rollout_batch_size": 0}, "rollout.batch_size is 0: set it to 1 or more"),
        ({"num_gpus": 0}, "num_gpus is 0: set it to 1 or more"),
        ({"group_size": 1}, "rollout.group_size is 1: set it to 2 or more"),
        ({"dtype": "float16"}, "model.dtype is 'float16': choose one of"),
        ({"precision": "16-mixed"}, "trainer.precision is '16-mixed': .* choose one of"),
        ({"strategy": "deepspeed_stage_2"}, "trainer.strategy is 'deepspeed_stage_2': .* choose auto"),
        ({"strategy": "fsdp"}, "trainer.strategy is 'fsdp': .* ddp or --config strategy/fsdp"),
        ({"strategy": "x.ModelParallelStrategy"}, "trainer.strategy is 'x.ModelParallelStrategy': .* choose"),
        ({"num_gpus": 3}, "data.prompts_per_step is 8: it must be a multiple of the 3 GPUs"),
        ({"completion_length": 20}, "completion_length is 20, block_length is 32"),
        ({"master_weights": True}, "model.optimizer.master_weights is True: .* float32 already"),
        (
            {"master_weights": True, "dtype": "bfloat16", "lora_rank": 4},
            "model.optimizer.master_weights is True: .* without model.lora",
        ),
        ({"lora_rank": 4, "lora_targets": ("wte",)}, r"model.lora.targets is \['wte'\]: .* choose among"),
    ],
)
def test_what_a_run_would_refuse_is_refused(settings: PlanSettings, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        replace(settings, **changes)


@pytest.mark.parametrize(
    ("strategy", "num_gpus", "sharded"),
    [
        ("auto", 8, False),
        ("ddp", 8, False),
        ("drift.strategy.ShardedStrategy", 8, True),
        ("ShardedStrategy", 2, True),
        ("drift.strategy.ShardedStrategy", 1, False),
        ("lightning.pytorch.strategies.DDPStrategy", 4, False),
    ],
)
def test_only_some_strategies_shard(settings: PlanSettings, strategy: str, num_gpus: int, sharded: bool):
    assert replace(settings, strategy=strategy, num_gpus=num_gpus).sharded is sharded


@pytest.mark.parametrize(
    ("changes", "weight", "trained", "compute"),
    [
        ({}, 4, 4, 4),
        ({"precision": "32"}, 4, 4, 4),
        ({"precision": "bf16-mixed"}, 4, 4, 2),
        ({"dtype": "bfloat16"}, 2, 2, 2),
        ({"dtype": "bfloat16", "lora_rank": 2}, 2, 4, 2),
    ],
)
def test_bytes_of_a_number(settings: PlanSettings, changes: dict, weight, trained, compute):
    found = replace(settings, **changes)
    assert found.weight_bytes == weight
    assert (found.trained_bytes, found.compute_bytes) == (trained, compute)


def test_a_second_copy_of_weights_is_kept_only_where_it_is_needed(settings: PlanSettings, make_policy):
    other = sizes_of(make_policy(n_layers=1), "there")
    assert settings.kept_reference is None
    assert replace(settings, reference=other).kept_reference is None
    assert replace(settings, beta=0.1).kept_reference is settings.policy
    assert replace(settings, beta=0.1, reference=other).kept_reference is other
    assert replace(settings, beta=0.1, lora_rank=2).kept_reference is None
    assert replace(settings, beta=0.1, lora_rank=2, reference=other).kept_reference is other


def test_a_noisy_state_is_never_longer_than_the_policy_allows(settings: PlanSettings):
    assert settings.length == 128
    assert replace(settings, max_prompt_length=50, completion_length=32).length == 82


class UsersOwn(FullSampler):
    """A class of a user's, with arguments of its own."""

    def __init__(self, each: int) -> None:
        self.max_states = 2 * each


@pytest.mark.parametrize(
    ("arguments", "states"),
    [
        ([], 2),
        (["--model.sampler=CoupledElbo"], 4),
        (["--model.sampler=CoupledMask"], 2),
        (["--model.sampler=AllMask"], 1),
        (["--model.sampler=Full"], None),
        (["--model.sampler=Trace", "--model.sampler.shrink=2"], None),
        ([f"--model.sampler={__name__}.UsersOwn", "--model.sampler.each=3"], 6),
        (["--model.sampler=drift.samplers.weighted.WeightedSampler", "--model.sampler.k=3"], 3),
        (["--model.sampler.k=7"], 7),
    ],
)
def test_the_plan_knows_how_many_states_a_sampler_takes(arguments: list[str], states: int | None):
    recipe = ["--config=quickstart", "--model.micro_batch_size=1000"]
    settings = plan_settings(parsed([*recipe, *arguments]), 1)
    assert settings.states_per_row == states
    assert settings.num_states == (1000 if states is None else 16 * 8 * states)
