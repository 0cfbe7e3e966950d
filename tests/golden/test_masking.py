from typing import Any

import pytest
import torch

from drift.contract import ConfigError, Rollout
from drift.samplers import CoupledMaskSampler, RandomMaskSampler, UniformSampler, WeightedSampler
from drift.samplers.base import candidates

DRAWS = 4000

SEQUENTIAL = (
    "llada_T1",
    "llada_T2",
    "llada_T9999",
    "llada_Tinf",
    "llada_few_T0_k6",
    "llada_few_Tinf_k10",
    "synthetic_T1",
    "synthetic_Tinf",
)
MASKS = ("synthetic_random_r005", "synthetic_coupled", "one_valid_coupled")
MASKING_EXCEPTIONS = {
    "dream_T1_zero_probs": "METHOD 7.1: without recorded probabilities they sample uniformly, ours refuses",
}


def masking_case(record, name: str) -> tuple[dict[str, Any], Rollout]:
    cases, tensors = record("masking/masking")
    case = next(case for case in cases["cases"] if case["name"] == name)
    step_map, valid, probs = (
        tensors[f"{case['data']}.{key}"] for key in ("step_map", "completion_mask", "token_probs")
    )
    ids = torch.zeros(step_map.shape, dtype=torch.int64)
    rollout = Rollout(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones_like(ids[:, :1], dtype=torch.bool),
        completion_ids=ids,
        completion_mask=valid.bool(),
        step_map=step_map.long(),
        token_probs=probs,
    )
    return case, rollout


def test_no_masking_case_is_left_out(record):
    cases, _ = record("masking/masking")
    assert {case["name"] for case in cases["cases"]} == {*SEQUENTIAL, *MASKS, *MASKING_EXCEPTIONS}


@pytest.mark.parametrize("name", MASKING_EXCEPTIONS)
def test_probabilities_that_were_not_recorded_are_refused(record, name: str):
    _, rollout = masking_case(record, name)
    with pytest.raises(ConfigError, match="token_probs is missing, or 0 at all valid"):
        WeightedSampler().weights(rollout)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_candidates_and_weights(record, name: str):
    case, rollout = masking_case(record, name)
    found = candidates(rollout)
    weights = WeightedSampler().weights(rollout)
    assert torch.equal(weights > -torch.inf, found)
    for row, theirs in enumerate(case["per_sample"]):
        ours = found[row].nonzero()[:, 0].tolist()
        if theirs["mode"] == "dummy" and rollout.completion_mask[row].any():
            assert ours == [0]  # METHOD 7.5: a row with one timestep has something to learn from
            continue
        assert ours == theirs["candidates"]
        if theirs["weights"] is not None:
            torch.testing.assert_close(
                weights[row, ours], torch.tensor(theirs["weights"]), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_timesteps_are_drawn_with_the_recorded_probabilities(record, name: str):
    case, rollout = masking_case(record, name)
    num_rows = len(rollout.step_map)
    many = rollout.select(torch.arange(num_rows).repeat_interleave(DRAWS))
    sampler = WeightedSampler(k=case["k"], temperature=float(case["sample_temperature"]))
    plan = sampler.plan(many, torch.Generator().manual_seed(0))
    timesteps = torch.where(plan.current, many.step_map, -1).amax(dim=2)
    real = (plan.weight > 0)[:, :, None]
    assert torch.equal(plan.masked, (many.step_map >= timesteps[:, :, None]) & real)
    assert torch.equal(plan.current, (many.step_map == timesteps[:, :, None]) & real)
    counts = (
        torch.nn.functional.one_hot(timesteps + 1).sum(dim=0)[:, 1:].unflatten(0, (num_rows, DRAWS)).double()
    )
    for row, theirs in enumerate(case["per_sample"]):
        if not rollout.completion_mask[row].any():
            assert counts[row].sum() == 0
            continue
        if theirs["mode"] == "dummy":  # METHOD 7.5: a single timestep is drawn k times
            expected = [float(case["k"])]
        elif theirs["mode"] == "topk":
            expected = theirs["empirical_mean_count"]  # nothing is random here
        else:
            expected = theirs.get("expected_count_per_candidate") or theirs["inclusion_probability"]
        steps = theirs["candidates"] or [0]
        ours = counts[row][:, steps]
        # 5 standard errors of the mean of DRAWS draws.
        tolerance = 5 * ours.var(dim=0, correction=0).sqrt() / DRAWS**0.5 + 1e-9
        off = (ours.mean(dim=0) - torch.tensor(expected, dtype=torch.float64)).abs()
        assert (off <= tolerance).all(), (row, off, tolerance)
        assert counts[row].sum() == ours.sum(), "a timestep that is no candidate was drawn"


def test_the_largest_weights_at_temperature_zero_are_theirs(record):
    case, rollout = masking_case(record, "llada_few_T0_k6")
    plan = WeightedSampler(k=6, temperature=0).plan(rollout, torch.Generator().manual_seed(0))
    ours = torch.where(plan.current, rollout.step_map, -1).amax(dim=2).T.sort(dim=1).values
    for run in case["runs"]:
        assert torch.equal(ours, torch.tensor(run["step_ids"]).sort(dim=1).values)


def test_uniform_is_the_weighted_sampler_at_infinite_temperature(record):
    _, rollout = masking_case(record, "llada_Tinf")
    plans = [
        sampler.plan(rollout, torch.Generator().manual_seed(3))
        for sampler in (UniformSampler(k=4), WeightedSampler(k=4, temperature=float("inf")))
    ]
    assert torch.equal(plans[0].masked, plans[1].masked)


@pytest.mark.parametrize("name", MASKS)
def test_random_and_coupled_masks_cover_as_many_tokens(record, name: str):
    case, rollout = masking_case(record, name)
    _, tensors = record("masking/masking")
    coupled = case["strategy"] == "coupled_random_masking"
    sampler = CoupledMaskSampler() if coupled else RandomMaskSampler(k=case["k"], ratio=case["mask_ratio"])
    for seed in case["seeds"]:
        theirs = tensors[f"{name}.seed{seed}.should_mask"].bool().transpose(0, 1)
        plan = sampler.plan(rollout, torch.Generator().manual_seed(seed))
        assert torch.equal(plan.masked.sum(dim=2), theirs.sum(dim=2))
        assert torch.equal(plan.masked, plan.current)
        assert not (plan.masked & ~rollout.completion_mask).any()
        assert torch.equal(plan.weight > 0, theirs.any(dim=2))
        if coupled:
            assert torch.equal(plan.masked[0] ^ plan.masked[1], rollout.completion_mask)
