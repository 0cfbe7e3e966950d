import copy
import io
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from drift.contract import ConfigError
from drift.models import LLaDA
from drift.optimizer import (
    MasterAdamW,
    OptimizerConfig,
    apply_settings,
    build_optimizer,
    build_schedule,
    clip_gradients,
    require_precise,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"lr is 0.0: set it to a positive number"),
        ({"lr": -1e-6}, r"lr is -1e-06: set it to a positive number"),
        ({"lr": math.nan}, r"lr is nan"),
        ({"lr": math.inf}, r"lr is inf"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\): set both in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas is \(-0.1, 0.9\)"),
        ({"weight_decay": -0.01}, r"weight_decay is -0.01: set it to 0 or more"),
        ({"weight_decay": math.nan}, r"weight_decay is nan"),
        ({"gradient_clip": 0.0}, r"gradient_clip is 0.0: set it to a positive norm"),
        ({"gradient_clip": math.nan}, r"gradient_clip is nan"),
        ({"warmup_steps": -1}, r"warmup_steps is -1: set it to 0 or more optimizer steps"),
        ({"schedule": "sqrt"}, r"schedule is 'sqrt': choose one of \['constant', 'linear', 'cosine'\]"),
    ],
)
def test_a_value_outside_its_range_is_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


def test_norms_and_biases_are_not_decayed(make_policy: Callable[..., LLaDA]):
    policy = make_policy(include_qkv_bias=True)
    policy.blocks[0].requires_grad_(False)
    optimizer = build_optimizer(policy, OptimizerConfig(lr=0.1, betas=(0.8, 0.95), weight_decay=0.5))
    names = {id(p): name for name, p in policy.named_parameters()}
    decayed, spared = (
        {names[id(p)].removeprefix("model.transformer.") for p in group["params"]}
        for group in optimizer.param_groups
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    matrices = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert decayed == {"wte.weight", "ff_out.weight"} | {f"blocks.1.{name}.weight" for name in matrices}
    assert spared == {"ln_f.weight", "blocks.1.attn_norm.weight", "blocks.1.ff_norm.weight"} | {
        f"blocks.1.{name}.bias" for name in ("q_proj", "k_proj", "v_proj")
    }


def test_decay_shrinks_matrices_only():
    module = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.ones_(module.bias)
    optimizer = build_optimizer(module, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # A zero gradient leaves the decay alone: 1 - 0.1 * 0.5.
    torch.testing.assert_close(module.weight, torch.full((2, 2), 0.95))
    torch.testing.assert_close(module.bias, torch.ones(2))


def test_settings_stand_where_a_checkpoint_left_others():
    config = OptimizerConfig(lr=1e-2, betas=(0.5, 0.5), weight_decay=0.1, warmup_steps=4)
    optimizer, schedule = stepped(config, steps=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    now = OptimizerConfig(lr=1e-3, weight_decay=0.3, schedule="linear")
    changed = build_optimizer(nn.Linear(2, 2), now)
    going_on = build_schedule(changed, now, num_steps=10)
    changed.load_state_dict(optimizer.state_dict())
    going_on.load_state_dict(schedule.state_dict())
    apply_settings(changed, going_on, now)
    for group, decay in zip(changed.param_groups, (0.3, 0.0), strict=True):
        assert group["lr"] == pytest.approx(0.8e-3)
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), decay)
    changed.step()
    going_on.step()
    assert changed.param_groups[0]["lr"] == pytest.approx(0.7e-3)


def test_the_same_settings_change_no_bit():
    config = OptimizerConfig(lr=0.1 / 3, warmup_steps=7, schedule="cosine", weight_decay=0.1)
    optimizer, schedule = stepped(config, steps=3)
    before = optimizer.state_dict()["param_groups"], schedule.state_dict()["_last_lr"]
    apply_settings(optimizer, schedule, config)
    assert (optimizer.state_dict()["param_groups"], schedule.state_dict()["_last_lr"]) == before


def stepped(config: OptimizerConfig, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, num_steps=10)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def test_a_module_without_matrices_has_one_group():
    optimizer = build_optimizer(torch.nn.LayerNorm(3), OptimizerConfig(weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, [0, 0.5, 1, 0.5, 0]),
        # (1 + cos(pi t)) / 2 at t = 0, 1/4, 1/2, 3/4, 1
        ("cosine", 0, [1, 0.85355, 0.5, 0.14645, 0]),
        ("cosine", 2, [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_schedules(schedule: str, warmup: int, expected: list[float]):
    config = OptimizerConfig(lr=0.2, schedule=schedule, warmup_steps=warmup)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    steps = build_schedule(optimizer, config, num_steps=4)
    found = []
    for _ in expected:
        found.append(optimizer.param_groups[0]["lr"] / 0.2)
        optimizer.step()
        steps.step()
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("max_norm", "left"), [(1.0, 1.0), (10.0, 5.0), (math.inf, 5.0)])
def test_gradients_are_clipped_by_their_whole_norm(max_norm: float, left: float):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, max_norm).item() == pytest.approx(5.0)  # sqrt(9 + 16)
    assert math.hypot(*(p.grad.item() for p in parameters)) == pytest.approx(left, rel=1e-5)


def test_the_norm_of_no_gradients_is_where_the_parameters_are():
    # Ranks on GPUs compare their norms there, and cannot do so on the CPU.
    norm = clip_gradients([torch.nn.Parameter(torch.zeros(2, device="meta"))], 1.0)
    assert (norm.shape, norm.device.type) == ((), "meta")
    assert clip_gradients([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0


def twins(lr: float, **settings) -> tuple[list[torch.nn.Module], list[torch.optim.AdamW]]:
    """A bfloat16 module with master weights, and one of the same numbers in float32."""
    torch.manual_seed(0)
    low = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5)).bfloat16()
    modules = [low, copy.deepcopy(low).float()]
    return modules, [
        build_optimizer(module, OptimizerConfig(lr=lr, master_weights=masters, **settings))
        for module, masters in zip(modules, (True, False), strict=True)
    ]


def give_gradients(modules: list[torch.nn.Module], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameters in zip(*(module.parameters() for module in modules), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator).bfloat16()
        for parameter in parameters:
            parameter.grad = gradient.to(parameter.dtype)


def test_master_weights_are_those_of_float32_training():
    modules, optimizers = twins(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.3)
    for step in range(20):
        give_gradients(modules, step)
        for optimizer in optimizers:
            optimizer.step()
        for low, full in zip(*(module.parameters() for module in modules), strict=True):
            # torch may sum and round several tensors at once in another order than one by one.
            torch.testing.assert_close(optimizers[0].state[low]["master"], full, rtol=1e-6, atol=1e-8)
            assert low.dtype == torch.bfloat16
            assert torch.equal(low, optimizers[0].state[low]["master"].bfloat16())


def test_steps_of_one_millionth_add_up():
    modules, optimizers = twins(lr=1e-6)
    plain = copy.deepcopy(modules[0])
    modules.append(plain)
    optimizers.append(build_optimizer(plain, OptimizerConfig(lr=1e-6)))
    start = plain[0].weight.detach().clone()
    for _ in range(1000):
        give_gradients(modules, 0)
        for optimizer in optimizers:
            optimizer.step()
    # The same gradient each time: every weight moves by 1000 * 1e-6. A step is 1e-6 and float32's spacing at
    # 0.4 is 3e-8, so that a step may be off by 1.5 %; bfloat16's is 2e-3, so that the largest stay.
    low, full = (module[0].weight.detach().float() for module in modules[:2])
    torch.testing.assert_close((full - start).abs(), torch.full((5, 6), 1e-3), rtol=0.02, atol=0)
    torch.testing.assert_close(low, full, rtol=2**-8, atol=0)
    assert (low != start).float().mean() > 0.4
    assert (plain[0].weight == start).float().mean() > 0.9, "bfloat16 alone loses them"


def test_optimizer_state_takes_twelve_bytes_a_parameter():
    modules, optimizers = twins(lr=1e-3)
    give_gradients(modules, 0)
    optimizers[0].step()
    states = list(optimizers[0].state.values())
    assert all(set(state) == {"step", "master", "exp_avg", "exp_avg_sq"} for state in states)
    # 6 * 5 + 5 weights and biases, 5 + 5 of the norm; a step count of 4 bytes for each of the 4 tensors.
    size = sum(value.numel() * value.element_size() for state in states for value in state.values())
    assert size == 12 * 45 + 4 * 4


def test_a_resumed_optimizer_goes_on_bit_by_bit():
    modules, optimizers = twins(lr=1e-5)
    whole, optimizer = modules[0], optimizers[0]
    for step in range(3):
        give_gradients([whole], step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"weights": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = copy.deepcopy(whole)
    other.load_state_dict(saved["weights"])
    resumed = build_optimizer(other, OptimizerConfig(lr=0.5, master_weights=True))
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == 1e-5
    for step in range(3, 6):
        for p, q in zip(whole.parameters(), other.parameters(), strict=True):
            for name, value in optimizer.state[p].items():
                assert value.dtype == resumed.state[q][name].dtype == torch.float32
                assert torch.equal(value, resumed.state[q][name]), name
            assert torch.equal(p, q)
        give_gradients([whole, other], step)
        optimizer.step()
        resumed.step()


def test_distributed_checkpoints_take_the_master_weights():
    """By parameter names, as sharded checkpoints do it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    modules, optimizers = twins(lr=1e-3)
    give_gradients(modules, 0)
    optimizers[0].step()
    state = copy.deepcopy(get_optimizer_state_dict(modules[0], optimizers[0]))
    assert state["state"]["0.weight"]["master"].dtype == torch.float32
    other = copy.deepcopy(modules[0])
    before = [p.detach().clone() for p in other.parameters()]
    resumed = build_optimizer(other, OptimizerConfig(lr=1e-3, master_weights=True))
    set_optimizer_state_dict(other, resumed, state)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
    for p, q in zip(modules[0].parameters(), other.parameters(), strict=True):
        for name, value in optimizers[0].state[p].items():
            assert torch.equal(value, resumed.state[q][name]), name


def test_parameters_without_gradients_are_left_alone_and_a_closure_is_called():
    modules, optimizers = twins(lr=1e-3)
    before = modules[0][1].weight.detach().clone()

    def closure() -> torch.Tensor:
        loss = modules[0][0](torch.ones(2, 6, dtype=torch.bfloat16)).sum()
        loss.backward()
        return loss

    assert isinstance(optimizers[0], MasterAdamW)
    assert optimizers[0].step(closure) is not None
    assert len(optimizers[0].state) == 2
    assert torch.equal(modules[0][1].weight, before)


def test_master_weights_of_float32_are_refused():
    config = OptimizerConfig(master_weights=True)
    for call in (
        lambda: build_optimizer(torch.nn.Linear(2, 2), config),
        lambda: require_precise(config, torch.float32),
    ):
        with pytest.raises(
            ConfigError, match=r"master_weights is True: .* float32 already .*set it to false"
        ):
            call()
    require_precise(config, torch.bfloat16)


@pytest.mark.parametrize(
    ("lr", "dtype", "masters", "warned"),
    [
        (9e-5, torch.bfloat16, False, True),
        (1e-4, torch.bfloat16, False, False),
        (1e-6, torch.bfloat16, True, False),
        (1e-6, torch.float32, False, False),
    ],
)
def test_updates_too_small_for_the_dtype_are_warned_of(lr: float, dtype, masters: bool, warned: bool):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        require_precise(OptimizerConfig(lr=lr, master_weights=masters), dtype)
    assert len(caught) == warned
