from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from drift.contract import Rollout
from drift.rollout import DenoiseConfig, denoise

STATIC = "METHOD 7.7: their static schedules differ between the families; ours is one rule"


def exception(family: str, case: dict[str, Any]) -> str | None:
    """Why a recorded rollout is not ours, if it is not."""
    if family == "llada" and case["target"] == "neg_entropy":
        return "METHOD 7.7: the recorded score has the wrong sign and prefers uncertain tokens"
    if family == "llada" and case["pad_lens"] is not None:
        return "METHOD 7.3: the recorded rollout attends to left padding"
    if family == "dream" and case["threshold"] is None:
        return STATIC
    if family == "dream" and (case["top_k"] is not None or case["top_p"] is not None):
        return "METHOD 7.7: filters rescale the confidence that the recorded threshold was compared with"
    if case.get("pad_target_penalty", 1.0) != 1.0:
        return "a penalty on padding is not part of the method"
    return None


def test_most_of_the_recorded_rollouts_are_compared(record):
    for family, least in (("llada", 9), ("dream", 9)):
        cases, _ = record(f"rollouts/{family}")
        assert sum(exception(family, case) is None for case in cases["cases"]) >= least


def renumbered(step_map: Tensor, valid: Tensor) -> Tensor:
    """Each row's timesteps renumbered 0, 1, 2, ... over its valid positions, 0 elsewhere."""
    result = torch.zeros_like(step_map)
    for row, good, out in zip(step_map, valid, result, strict=True):
        out[good] = torch.searchsorted(row[good].unique(), row[good])
    return result


@pytest.fixture
def replay(record, models_of):
    def run(family: str, name: str) -> tuple[Rollout, dict[str, Any], Callable[[str], Tensor]]:
        cases, tensors = record(f"rollouts/{family}")
        case = next(case for case in cases["cases"] if case["name"] == name)
        policy = models_of(family).current
        head = policy.head.weight.detach().clone()
        config = DenoiseConfig(
            block_length=case["block_length"],
            threshold=case["threshold"],
            steps=case["steps"],
            score={"margin_confidence": "margin"}.get(case["target"], case["target"]),
            top_p=case.get("top_p"),
            top_k=case.get("top_k"),
            use_cache=case["use_cache"],
            horizon=case["further_horizon"],
            block_opening="first_token" if family == "dream" else "confidence",
            # Their Dream ends a batch whose rows have all ended, their LLaDA never does.
            stop_at_padding=name.startswith("all_pad_stop"),
        )
        prompt_ids, prompt_mask = tensors[f"{name}.prompt_ids"].long(), tensors[f"{name}.prompt_mask"].bool()
        try:
            with torch.no_grad():
                for row, value in (case.get("lm_bias") or {}).items():
                    policy.head.weight[int(row), 0] = value
            rollout = denoise(policy, prompt_ids, prompt_mask, case["gen_length"], config)
        finally:
            with torch.no_grad():
                policy.head.weight.copy_(head)
        return rollout, case, lambda key: tensors[f"{name}.{key}"]

    return run


@pytest.mark.recorded("rollouts")
def test_rollout(replay, record, family: str, name: str):
    cases, _ = record(f"rollouts/{family}")
    reason = exception(family, next(case for case in cases["cases"] if case["name"] == name))
    if reason is not None:
        pytest.skip(reason)
    rollout, case, theirs = replay(family, name)
    whole = torch.cat((rollout.prompt_ids, rollout.completion_ids), dim=1)
    # Where the prompt is padding, the ids are anything.
    seen = torch.cat((rollout.prompt_mask, torch.ones_like(rollout.completion_mask)), dim=1)
    assert torch.equal(whole[seen], theirs("sequences").long()[seen])
    valid = theirs("completion_mask").bool()
    assert torch.equal(rollout.completion_mask, valid)
    assert torch.equal(renumbered(rollout.step_map, valid), theirs("step_map").long())
    assert rollout.token_probs is not None
    if case["token_probs_all_zero"]:  # METHOD 7.1: their Dream never recorded them
        assert (rollout.token_probs[valid] > 0).all()
    else:
        torch.testing.assert_close(
            rollout.token_probs.double() * valid, theirs("token_probs") * valid, rtol=0, atol=1e-4
        )
    assert rollout.num_forwards <= case["model_calls"]
    assert rollout.num_timesteps is not None
    assert rollout.num_timesteps.max() <= rollout.num_forwards


def test_left_padding_is_not_seen(replay, models_of):
    """METHOD 7.3, what ours does instead: the padded rows are those that the same prompts give alone."""
    rollout, case, theirs = replay("llada", "dyn_leftpad_cache_h8")
    config = DenoiseConfig(block_length=8, threshold=0.45, use_cache=True, horizon=8, stop_at_padding=False)
    for row, length in enumerate(case["pad_lens"]):
        prompt = theirs("prompt_ids")[row : row + 1, -length:].long()
        mask = torch.ones_like(prompt, dtype=torch.bool)
        alone = denoise(models_of("llada").current, prompt, mask, 32, config)
        assert torch.equal(alone.completion_ids[0], rollout.completion_ids[row])
    # the row without padding
    assert torch.equal(rollout.completion_ids[0], theirs("sequences")[0, 12:].long())


def test_filters_leave_the_score_alone(replay, models_of):
    """METHOD 7.7, what ours does instead: at temperature 0 a filter changes nothing at all."""
    rollout, case, theirs = replay("dream", "dyn_top_k3")
    config = DenoiseConfig(
        block_length=8, threshold=case["threshold"], block_opening="first_token", stop_at_padding=False
    )
    prompt, mask = theirs("prompt_ids").long(), theirs("prompt_mask").bool()
    plain = denoise(models_of("dream").current, prompt, mask, case["gen_length"], config)
    assert torch.equal(rollout.completion_ids, plain.completion_ids)
    assert torch.equal(rollout.step_map, plain.step_map)


def test_one_static_rule_for_both_families(replay):
    """METHOD 7.7: as many timesteps as asked for; a Dream block opens with its first position alone."""
    rollout, case, _ = replay("dream", "static_cache_h8_16")
    assert rollout.num_timesteps.tolist() == [case["steps"]] * 3
    blocks = rollout.step_map.unflatten(1, (-1, 8))
    assert (blocks[:, :, 0] == torch.arange(0, 16, 4)).all()
    # 4 steps a block: 1, then the other 7 spread as 3, 2, 2.
    counts = torch.nn.functional.one_hot(rollout.step_map).sum(dim=1)
    assert (counts == torch.tensor([1, 3, 2, 2] * 4)).all()
