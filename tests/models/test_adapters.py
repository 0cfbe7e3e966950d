import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drift.contract import ConfigError
from drift.models import (
    LLaDA,
    LoRAConfig,
    adapters_off,
    add_adapters,
    fingerprint,
    load_policy,
    merged_state_dict,
    reference_of,
    require_adapters,
)

Make = Callable[..., LLaDA]
IDS = torch.arange(2, 26)[None]
LAYERS = ["attn_out", "ff_out", "ff_proj", "k_proj", "q_proj", "up_proj", "v_proj"]


def adapted(policy: LLaDA, seed: int = 0, **settings) -> LLaDA:
    """With adapters that have learned something."""
    add_adapters(policy, LoRAConfig(**{"rank": 3, "alpha": 6} | settings), seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def trained(policy: LLaDA) -> dict[str, torch.Tensor]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank is 0: set it to 1 or more"),
        ({"alpha": 0.0}, r"alpha is 0.0: set it to a positive number"),
        ({"alpha": float("inf")}, r"alpha is inf"),
        ({"targets": []}, r"targets is \[\]: name one, or null for all"),
    ],
)
def test_a_value_outside_its_range_is_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**settings)


def test_every_layer_of_the_blocks_is_adapted_and_the_head_is_not(make_policy: Make):
    policy = make_policy()
    assert require_adapters(policy, LoRAConfig()) == LAYERS
    add_adapters(policy, LoRAConfig(rank=3), seed=0)
    found = {name.removeprefix("model.transformer.blocks.") for name in trained(policy)}
    expected = {
        f"{block}.{layer}.lora_{part}.default.weight"
        for block in (0, 1)
        for layer in LAYERS
        for part in ("A", "B")
    }
    assert found == expected
    assert trained(policy)["model.transformer.blocks.1.ff_out.lora_A.default.weight"].shape == (3, 64)


def test_chosen_targets(make_policy: Make):
    policy = make_policy()
    add_adapters(policy, LoRAConfig(targets=["ff_out", "q_proj"]), seed=0)
    assert {name.split(".")[4] for name in trained(policy)} == {"ff_out", "q_proj"}
    assert len(trained(policy)) == 8


@pytest.mark.parametrize("name", ["wte", "attn_norm", "Q_PROJ", "ln_f", "_proj", "lora_A"])
def test_a_target_that_is_no_layer_of_the_blocks_is_refused(policy: LLaDA, name: str):
    with pytest.raises(ConfigError, match=rf"no linear layer '{name}'; choose among .*'attn_out', 'ff_out'"):
        require_adapters(policy, LoRAConfig(targets=["q_proj", name]))


def test_a_missing_installation_is_named(policy: LLaDA, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model\.lora is set: .*pip install drift\[lora\]"):
        require_adapters(policy, LoRAConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing(make_policy: Make, dtype: torch.dtype):
    policy = make_policy()
    torch.nn.Module.to(policy, dtype)
    with torch.no_grad():
        before = policy.logits(IDS)
        add_adapters(policy, LoRAConfig(), seed=0)
        assert torch.equal(policy.logits(IDS), before)
    assert {p.dtype for p in trained(policy).values()} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {dtype}


def test_adapters_are_drawn_from_the_seed_alone(make_policy: Make):
    def drawn(seed: int, used: int) -> dict[str, torch.Tensor]:
        policy = make_policy()
        torch.manual_seed(used)
        before = torch.get_rng_state()
        add_adapters(policy, LoRAConfig(rank=8), seed)
        assert torch.equal(torch.get_rng_state(), before), "others draw as if there were no adapters"
        return trained(policy)

    one, same, other = drawn(0, used=3), drawn(0, used=4), drawn(1, used=3)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    for name, value in one.items():
        if "lora_B" in name:
            assert not value.any()
            continue
        assert not torch.equal(value, other[name])
        # Uniform in +-1/sqrt(width): the largest of 8 * width draws is near the bound.
        bound = value.shape[1] ** -0.5
        assert 0.9 * bound < float(value.detach().abs().max()) <= bound
    q_proj, k_proj = (
        one[f"model.transformer.blocks.0.{name}.lora_A.default.weight"] for name in ("q_proj", "k_proj")
    )
    assert not torch.equal(q_proj, k_proj)


def test_an_adapted_layer_by_hand(make_policy: Make):
    policy = adapted(make_policy(), targets=["up_proj"])
    layer = policy.blocks[0].up_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        # alpha / rank = 6 / 3.
        low = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 2 * low)


def test_off_is_the_policy_before_and_on_again_afterwards(make_policy: Make):
    policy = make_policy()
    with torch.no_grad():
        before = policy.logits(IDS)
        adapted(policy)
        after = policy.logits(IDS)
        parameters = trained(policy).keys()
        with adapters_off(policy) as same:
            assert same is policy
            assert torch.equal(policy.logits(IDS), before)
            assert trained(policy).keys() == parameters, "what communicates gradients must see no change"
        assert torch.equal(policy.logits(IDS), after)
        assert not torch.equal(before, after)
        with pytest.raises(RuntimeError, match="no luck"), adapters_off(policy):
            raise RuntimeError("no luck")
        assert torch.equal(policy.logits(IDS), after)
        assert trained(policy).keys() == parameters


def test_the_reference_is_the_copy_where_there_is_one(make_policy: Make):
    policy, other = adapted(make_policy()), make_policy(seed=1)
    with reference_of(policy, other) as reference:
        assert reference is other
        assert not policy.blocks[0].q_proj.disable_adapters
    with reference_of(policy, None) as reference:
        assert reference is policy
        assert policy.blocks[0].q_proj.disable_adapters


@pytest.mark.parametrize("changes", [{}, {"include_qkv_bias": True}, {"weight_tying": True}])
def test_merged_weights_have_the_hubs_names_and_compute_the_same(make_policy: Make, changes: dict):
    plain = make_policy(**changes, init_std=0.05)
    policy = adapted(make_policy(**changes, init_std=0.05))
    with torch.no_grad():
        logits = policy.logits(IDS)
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        merged = merged_state_dict(policy)
        assert list(merged) == list(plain.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert torch.equal(policy.logits(IDS), logits)
        changed = {name for name, value in merged.items() if not torch.equal(value, plain.state_dict()[name])}
        assert {name.split(".")[4] for name in changed} == set(LAYERS)
        assert (plain.logits(IDS) - logits).abs().max() > 0.1
        plain.load_state_dict(merged)
        torch.testing.assert_close(plain.logits(IDS), logits, rtol=0, atol=1e-5)


def test_without_adapters_merged_is_the_state_dict(policy: LLaDA):
    merged = merged_state_dict(policy)
    assert list(merged) == list(policy.state_dict())
    assert all(torch.equal(value, merged[name]) for name, value in policy.state_dict().items())


def test_bfloat16_is_merged_with_one_rounding(make_policy: Make):
    policy = make_policy()
    torch.nn.Module.to(policy, torch.bfloat16)
    adapted(policy, targets=["q_proj"])
    layer = policy.blocks[0].q_proj
    name = "model.transformer.blocks.0.q_proj.weight"
    with torch.no_grad():
        update = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = (layer.base_layer.weight.float() + update).bfloat16()
    assert torch.equal(merged_state_dict(policy)[name], expected)


def test_the_saved_folder_is_that_of_a_policy_without_adapters(make_policy: Make, tmp_path: Path):
    make_policy().save_pretrained(tmp_path / "plain")
    policy = adapted(make_policy())
    policy.save_pretrained(tmp_path / "adapted")
    plain, found = (tmp_path / name for name in ("plain", "adapted"))
    assert {file.name for file in found.iterdir()} == {file.name for file in plain.iterdir()}
    assert (found / "config.json").read_text() == (plain / "config.json").read_text()
    names, saved = load_file(plain / "model.safetensors"), load_file(found / "model.safetensors")
    assert saved.keys() == names.keys()
    assert len(trained(policy)) == 28, "the adapters are still there"
    with torch.no_grad():
        # Logits of size 10.
        torch.testing.assert_close(load_policy(found).logits(IDS), policy.logits(IDS), rtol=1e-5, atol=1e-4)


def test_a_fingerprint_tells_weights_apart_and_not_their_dtype(make_policy: Make):
    name = fingerprint(make_policy())
    assert name == fingerprint(make_policy())
    assert name != fingerprint(make_policy(seed=1))
    low = make_policy()
    torch.nn.Module.to(low, torch.bfloat16)
    assert name == fingerprint(low)
    with torch.no_grad():
        low.blocks[1].ff_norm.weight[3] += 0.1
    assert name != fingerprint(low)
