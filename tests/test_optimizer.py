import math
from collections.abc import Callable

import pytest
import torch

from drift.contract import ConfigError
from drift.models import LLaDA
from drift.optimizer import OptimizerConfig, build_optimizer, build_schedule, clip_gradients


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
