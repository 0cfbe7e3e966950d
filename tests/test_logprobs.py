from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from drift.contract import MaskedBatch, Rollout
from drift.logprobs import token_logprobs
from drift.masking import masked_batch
from drift.models import LLaDA
from drift.samplers import UniformSampler


@pytest.fixture(scope="module")
def batch(make_prompts: Callable) -> MaskedBatch:
    ids, mask = make_prompts(7, 3, 5)
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(3, 8, generator=generator) < 0.8
    rollout = Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        completion_ids=torch.randint(2, 48, (3, 8), generator=generator).masked_fill(~valid, 0),
        completion_mask=valid,
        step_map=torch.randint(0, 4, (3, 8), generator=generator),
    )
    return masked_batch(rollout, UniformSampler(k=2).plan(rollout, generator), 1)


def test_values_are_the_oracles(oracle: ModuleType, policy: LLaDA, batch: MaskedBatch):
    with torch.no_grad():
        found = token_logprobs(policy, batch, entropy=True)
        for i in range(len(batch)):
            ids = batch.input_ids[i][batch.attention_mask[i]].tolist()  # without padding
            logps, entropies = oracle.score_state(policy, ids[:-8], ids[-8:], batch.targets[i].tolist())
            scored = batch.scored[i]
            zero = torch.zeros((), dtype=torch.float64)
            expected = torch.stack([x if s else zero for x, s in zip(logps, scored, strict=True)])
            torch.testing.assert_close(found.logp[i].double(), expected, rtol=0, atol=5e-5)
            expected = torch.stack([x if s else zero for x, s in zip(entropies, scored, strict=True)])
            torch.testing.assert_close(found.entropy[i].double(), expected, rtol=0, atol=5e-5)
    assert found.logp.dtype == torch.float32


@pytest.mark.parametrize("width", [1, 5, 1000])
def test_tiles_change_neither_values_nor_gradients(
    make_policy: Callable[..., LLaDA], batch: MaskedBatch, width: int
):
    def both(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        policy = make_policy()
        found = token_logprobs(policy, batch, entropy=True, width=size)
        (found.logp.sum() + found.entropy.square().sum()).backward()
        return found.logp.detach(), [p.grad for p in policy.parameters()]

    whole, chunked = both(10**9), both(width)
    torch.testing.assert_close(chunked[0], whole[0], rtol=0, atol=1e-5)
    for ours, theirs in zip(chunked[1], whole[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_entropy_only_where_asked(policy: LLaDA, batch: MaskedBatch):
    with torch.no_grad():
        assert token_logprobs(policy, batch).entropy is None


def test_detach_keeps_the_numbers(policy: LLaDA, batch: MaskedBatch):
    found = token_logprobs(policy, batch, entropy=True)
    assert found.logp.requires_grad
    detached = found.detach()
    assert not detached.logp.requires_grad
    assert not detached.entropy.requires_grad
    assert torch.equal(detached.logp, found.logp)


def test_a_batch_in_which_nothing_is_scored(policy: LLaDA, batch: MaskedBatch):
    none = batch.select(torch.arange(2))
    none.scored = torch.zeros_like(none.scored)
    found = token_logprobs(policy, none, entropy=True)
    assert (found.logp == 0).all()
    found.logp.sum().backward()
    policy.zero_grad()


def test_the_mask_token_takes_no_probability(make_policy: Callable[..., LLaDA], batch: MaskedBatch):
    biased = make_policy(favour={1: 400.0})
    with torch.no_grad():
        assert token_logprobs(biased, batch).logp[batch.scored].mean() > -20  # it would be hundreds below
