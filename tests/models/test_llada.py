import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from drift.contract import ConfigError
from drift.models import LLaDA, LLaDAConfig, load_policy

Make = Callable[..., LLaDA]

# Float32 logits of size 10; padding changes the order of a sum, no more.
TOLERANCE = 1e-4


@pytest.mark.parametrize("pad", [1, 5, 17])
def test_logits_do_not_depend_on_left_padding(policy: LLaDA, pad: int):
    generator = torch.Generator().manual_seed(pad)
    ids = torch.randint(0, 48, (2, 11), generator=generator)
    padding = torch.randint(0, 48, (2, pad), generator=generator)  # any ids at all, the mask among them
    mask = F.pad(torch.ones_like(ids, dtype=torch.bool), (pad, 0))
    with torch.no_grad():
        padded = policy.logits(torch.cat((padding, ids), dim=1), mask)[:, pad:]
        torch.testing.assert_close(padded, policy.logits(ids), rtol=0, atol=TOLERANCE)


def test_logits_do_not_depend_on_what_stands_at_the_padding(policy: LLaDA, make_prompts: Callable):
    ids, mask = make_prompts(9, 4, 6)
    with torch.no_grad():
        one, other = (policy.logits(ids.masked_fill(~mask, token), mask)[mask] for token in (0, 1))
    assert torch.equal(one, other)


def test_logits_do_not_depend_on_the_neighbours(policy: LLaDA, make_prompts: Callable):
    ids, mask = make_prompts(9, 4, 6)
    with torch.no_grad():
        together = policy.logits(ids, mask)
        for row, length in enumerate((9, 4, 6)):
            alone = policy.logits(ids[row : row + 1, -length:])[0]
            torch.testing.assert_close(together[row, -length:], alone, rtol=0, atol=TOLERANCE)


def test_every_position_sees_both_sides(policy: LLaDA):
    ids = torch.full((1, 8), 5)
    with torch.no_grad():
        before = policy.logits(ids)
        for changed in range(8):
            other = ids.clone()
            other[0, changed] = 6
            moved = (policy.logits(other) - before).abs().amax(dim=2)[0]
            assert (moved > TOLERANCE).all()


def test_grouped_heads_are_repeated_heads(make_policy: Make):
    """Two kv heads for four query heads: the same as four heads whose kv weights are repeated."""
    grouped = make_policy(n_kv_heads=2)
    full = make_policy(n_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            # [2*8,32] -> each of the two heads twice -> [4*8,32]
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    ids = torch.arange(2, 14)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        torch.testing.assert_close(grouped.logits(ids), full.logits(ids), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(
            grouped.logits(ids, mask)[:, 3:], full.logits(ids[:, 3:]), rtol=0, atol=TOLERANCE
        )


VARIANTS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "padded vocabulary": {"vocab_size": 44, "embedding_size": 48},
    "qkv bias": {"include_qkv_bias": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_saved_and_loaded_is_bit_exact(make_policy: Make, tmp_path: Path, changes: dict):
    policy = make_policy(**changes)
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path).eval()
    ids = torch.arange(48)[None]
    assert loaded.head.weight.shape == (48, 32)
    assert {name: value.shape for name, value in loaded.state_dict().items()} == {
        name: value.shape for name, value in policy.state_dict().items()
    }
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(loaded.logits(ids), policy.logits(ids))


def test_saved_folder_is_the_hubs(make_policy: Make, tmp_path: Path):
    make_policy().save_pretrained(tmp_path)
    block = ("attn_norm", "attn_out", "ff_norm", "ff_out", "ff_proj", "k_proj", "q_proj", "up_proj", "v_proj")
    names = {f"model.transformer.blocks.{layer}.{part}.weight" for layer in (0, 1) for part in block}
    names |= {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")}
    assert set(load_file(tmp_path / "model.safetensors")) == names
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LLaDAModelLM"], "llada")
    assert (config["mask_token_id"], config["pad_token_id"], config["d_model"]) == (1, 0, 32)


def test_a_tied_head_is_not_saved_and_stays_tied(make_policy: Make, tmp_path: Path):
    make_policy(weight_tying=True).save_pretrained(tmp_path)
    assert "model.transformer.ff_out.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_policy(tmp_path)
    assert loaded.head.weight is loaded.get_input_embeddings().weight
    assert len(list(loaded.parameters())) == len({id(p) for p in loaded.parameters()})


def test_dtype_is_what_was_asked_for(make_policy: Make, tmp_path: Path):
    make_policy().save_pretrained(tmp_path)
    assert {p.dtype for p in load_policy(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_random_init_has_the_configs_spread_and_another_draw(make_policy: Make, tmp_path: Path):
    make_policy(init_std=0.3).save_pretrained(tmp_path)
    fresh, saved = load_policy(tmp_path, random_init=True), load_policy(tmp_path)
    weight = fresh.blocks[
        0
    ].ff_proj.weight  # 64 * 32 draws: the spread's standard error is 0.3 / sqrt(4096) = 0.005
    assert abs(weight.std().item() - 0.3) < 0.025
    assert not torch.equal(weight, saved.blocks[0].ff_proj.weight)
    assert (fresh.blocks[0].attn_norm.weight == 1).all()


def test_the_mask_token_gets_no_probability(policy: LLaDA):
    logits = torch.zeros(3, 48)
    logits[:, 1] = 1e4
    probs = policy.forbid_illegal(logits).softmax(dim=-1)
    assert (probs[:, 1] == 0).all()
    torch.testing.assert_close(probs[:, 2], torch.full((3,), 1 / 47))
    assert (logits[:, 1] == 1e4).all()  # the input is left alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_type": "sequential"}, "block_type: 'sequential'"),
        ({"activation_type": "swiglu"}, "activation_type: 'swiglu'"),
        ({"layer_norm_type": "default"}, "layer_norm_type: 'default'"),
        ({"include_bias": True}, "include_bias: True"),
        ({"alibi": True}, "alibi: True"),
        ({"rope": False}, "rope: False"),
        ({"attention_layer_norm": True}, "attention_layer_norm: True"),
        ({"input_emb_norm": True}, "input_emb_norm: True"),
        ({"scale_logits": True}, "scale_logits: True"),
        ({"mask_token_id": None}, "mask_token_id: None; it must be a token id below vocab_size 48"),
        ({"pad_token_id": None}, "pad_token_id: None; it must be a token id below vocab_size 48"),
        ({"residual_dropout": 0.1}, "residual_dropout: 0.1"),
        ({"n_heads": 5}, "d_model: 32, n_heads: 5, n_kv_heads: None; d_model must be a multiple"),
        ({"n_kv_heads": 3}, "d_model: 32, n_heads: 4, n_kv_heads: 3; d_model must be a multiple"),
    ],
)
def test_what_it_does_not_compute_is_refused(make_policy: Make, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        make_policy(**changes)


def test_rotary_positions_are_relative(policy: LLaDA):
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        here, there = (policy(ids, None, torch.arange(10)[None] + start) for start in (0, 40))
        torch.testing.assert_close(here, there, rtol=0, atol=TOLERANCE)
        stretched = policy(ids, None, 2 * torch.arange(10)[None])
    assert (here - stretched).abs().max() > 0.1


def test_the_config_keeps_keys_that_it_does_not_know():
    config = LLaDAConfig(d_model=32, n_heads=4, flash_attention=True)
    assert config.flash_attention is True
    assert config.hidden_size == 32


def test_rows_beyond_the_vocabulary_are_never_emitted(make_policy: Make):
    policy = make_policy(vocab_size=40, embedding_size=48)
    assert policy.illegal_token_ids == [1, *range(40, 48)]
    with torch.no_grad():
        policy.head.weight[40:] = 20 * policy.head.weight[2:10]
    logits = policy.forbid_illegal(policy.logits(torch.tensor([[3, 1, 5]])))
    assert logits.argmax(dim=-1).max() < 40
