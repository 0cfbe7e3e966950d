"""Hidden states of some positions are those that a pass gives everywhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from drift.models import DiffusionLM, Dream, DreamConfig
from drift.models.layers import positions_from_mask
from drift.rollout import PrefixCache

ROW, POSITION = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([5, 13, 8, 6, 13, 9])


@pytest.fixture(params=["llada", "dream"])
def policy(request: pytest.FixtureRequest, make_policy: Callable[..., Any]) -> DiffusionLM:
    if request.param == "llada":
        return make_policy()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    tokens = {"vocab_size": 48, "mask_token_id": 40, "pad_token_id": 0}
    return Dream(DreamConfig(**sizes, **tokens, intermediate_size=48, initializer_range=0.3)).eval()


@pytest.mark.parametrize("lengths", [(14, 14, 14), (14, 8, 11)])
def test_some_positions_are_as_in_a_whole_pass(policy: DiffusionLM, make_prompts: Callable, lengths):
    ids, mask = make_prompts(*lengths)
    with torch.no_grad():
        whole = policy(ids, mask)
        found = policy(ids, mask, wanted=(ROW, POSITION))
    assert found.shape == (6, 32)
    torch.testing.assert_close(found, whole[ROW, POSITION], rtol=1e-5, atol=1e-5)


def test_the_first_position_of_a_row_keeps_its_own_state(policy: DiffusionLM, make_prompts: Callable):
    ids, mask = make_prompts(14, 8)
    firsts = (torch.arange(2), torch.tensor([0, 6]))
    with torch.no_grad():
        torch.testing.assert_close(policy(ids, mask, wanted=firsts), policy(ids, mask)[firsts])


@pytest.mark.parametrize("first", [0, 4])
def test_windows_behind_a_cache_too(policy: DiffusionLM, make_prompts: Callable, first: int):
    """The state before the window comes from the pass that opened the block."""
    ids, mask = make_prompts(14, 11, 14)
    positions, caches = positions_from_mask(mask), [PrefixCache(first), PrefixCache(first)]
    window = (ids[:, first:], mask, positions[:, first:])
    wanted = (ROW, torch.tensor([0, 9, 3, 0, 5, 1]))
    with torch.no_grad():
        policy(ids, mask, positions, caches[0])
        opened = policy(ids, mask, positions, caches[1], (ROW, POSITION))
        torch.testing.assert_close(opened, policy(ids, mask)[ROW, POSITION], rtol=1e-5, atol=1e-5)
        whole = policy(*window, caches[0])
        for _ in range(2):
            found = policy(*window, caches[1], wanted)
            torch.testing.assert_close(found, whole[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_whole_pass(
    policy: DiffusionLM, make_prompts: Callable, checkpointing: bool
):
    ids, mask = make_prompts(14, 8, 11)
    policy.train().activation_checkpointing = checkpointing

    def gradients(hidden: torch.Tensor) -> list[torch.Tensor]:
        parameters = list(policy.parameters())
        found = torch.autograd.grad(hidden.square().sum(), parameters, allow_unused=True)
        return [g for g in found if g is not None]

    expected = gradients(policy(ids, mask)[ROW, POSITION])
    found = gradients(policy(ids, mask, wanted=(ROW, POSITION)))
    assert len(found) == len(expected) >= 20
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_last_block_computes_little_else(policy: DiffusionLM, make_prompts: Callable):
    sizes = []
    for block in policy.blocks:
        name = "ff_out" if hasattr(block, "ff_out") else "mlp.down_proj"
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args: sizes.append(args[0].shape[:-1].numel())
        )
    with torch.no_grad():
        policy(*make_prompts(14, 14, 14), wanted=(ROW, POSITION))
    assert sizes == [42] * (len(policy.blocks) - 1) + [6]
