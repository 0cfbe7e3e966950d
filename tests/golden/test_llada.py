"""Agreement with numbers recorded from the paper's own code on a tiny LLaDA, to the recorder's tolerances."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drift.advantages import group_advantages
from drift.contract import ConfigError, Rollout, TimestepPlan
from drift.logprobs import token_logprobs
from drift.losses import LossConfig, rldf_loss
from drift.masking import masked_batch
from drift.models import LLaDA, load_policy
from drift.rollout import DenoiseConfig, denoise
from drift.samplers import CoupledMaskSampler, RandomMaskSampler, UniformSampler, WeightedSampler
from drift.samplers.base import candidates

DRAWS = 4000


@cache
def record(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def models(golden: Path) -> SimpleNamespace:
    """The policy, the frozen reference and the old policy: half-way between the two."""
    current, reference, old = (load_policy(golden / "models/llada_tiny").eval() for _ in range(3))
    overrides = load_file(golden / "models/llada_ref_overrides.safetensors")
    with torch.no_grad():
        for name, value in overrides.items():
            start = current.get_parameter(name)
            reference.get_parameter(name).copy_(value)
            old.get_parameter(name).copy_(start + 0.5 * (value - start))
    return SimpleNamespace(current=current, reference=reference, old=old)


def close(ours: Any, theirs: Any, what: str = "") -> None:
    """Relative 1e-3, absolute 1e-5: the tolerance of loss metrics and gradients."""
    torch.testing.assert_close(
        torch.as_tensor(ours).double(),
        torch.as_tensor(theirs).double(),
        rtol=1e-3,
        atol=1e-5,
        msg=lambda report: f"{what}: {report}",
    )


def test_logits(golden: Path, models: SimpleNamespace):
    tensors = load_file(golden / "logits/llada.safetensors")
    with torch.no_grad():
        ours = models.current.logits(tensors["plain.input_ids"].long())
    torch.testing.assert_close(ours, tensors["plain.logits"], rtol=0, atol=1e-3)


# --- rollouts

ROLLOUTS = (
    "dyn_thr045",
    "dyn_thr030_block16",
    "dyn_oneblock",
    "dyn_cache_h8",
    "dyn_cache_h128",
    "static_32",
    "static_uneven_13",
    "static_cache_h8_16",
    "static_margin_16",
)
ROLLOUT_EXCEPTIONS = {
    "dyn_negentropy": "METHOD 7.7: the recorded score has the wrong sign and prefers uncertain tokens",
    "dyn_leftpad_cache_h8": "METHOD 7.3: the recorded rollout attends to left padding",
}


def test_no_rollout_is_left_out(golden: Path):
    cases, _ = record(golden / "rollouts", "llada")
    assert {case["name"] for case in cases["cases"]} == {*ROLLOUTS, *ROLLOUT_EXCEPTIONS}


def renumbered(step_map: Tensor, valid: Tensor) -> Tensor:
    """Each row's timesteps renumbered 0, 1, 2, ... over its valid positions, 0 elsewhere."""
    result = torch.zeros_like(step_map)
    for row, good, out in zip(step_map, valid, result, strict=True):
        out[good] = torch.searchsorted(row[good].unique(), row[good])
    return result


def replay(golden: Path, policy: LLaDA, name: str) -> tuple[Rollout, dict[str, Any], Callable[[str], Tensor]]:
    cases, tensors = record(golden / "rollouts", "llada")
    case = next(case for case in cases["cases"] if case["name"] == name)
    score = {"margin_confidence": "margin"}.get(case["target"], case["target"])
    config = DenoiseConfig(
        block_length=case["block_length"],
        threshold=case["threshold"],
        steps=case["steps"],
        score=score,
        use_cache=case["use_cache"],
        horizon=case["further_horizon"],
        stop_at_padding=False,
    )
    prompt_ids, prompt_mask = tensors[f"{name}.prompt_ids"].long(), tensors[f"{name}.prompt_mask"].bool()
    return (
        denoise(policy, prompt_ids, prompt_mask, case["gen_length"], config),
        case,
        lambda key: tensors[f"{name}.{key}"],
    )


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollout(golden: Path, models: SimpleNamespace, name: str):
    rollout, case, theirs = replay(golden, models.current, name)
    assert torch.equal(
        torch.cat((rollout.prompt_ids, rollout.completion_ids), dim=1), theirs("sequences").long()
    )
    valid = theirs("completion_mask").bool()
    assert torch.equal(rollout.completion_mask, valid)
    assert torch.equal(renumbered(rollout.step_map, valid), theirs("step_map").long())
    torch.testing.assert_close(
        rollout.token_probs.double() * valid, theirs("token_probs") * valid, rtol=0, atol=1e-4
    )
    assert rollout.num_forwards <= case["model_calls"]
    assert rollout.num_timesteps.max() <= rollout.num_forwards


def test_left_padding_is_not_seen(golden: Path, models: SimpleNamespace):
    """METHOD 7.3, what ours does instead: the padded rows are those that the same prompts give alone."""
    rollout, case, theirs = replay(golden, models.current, "dyn_leftpad_cache_h8")
    config = DenoiseConfig(block_length=8, threshold=0.45, use_cache=True, horizon=8, stop_at_padding=False)
    for row, length in enumerate(case["pad_lens"]):
        prompt = theirs("prompt_ids")[row : row + 1, -length:].long()
        alone = denoise(models.current, prompt, torch.ones_like(prompt, dtype=torch.bool), 32, config)
        assert torch.equal(alone.completion_ids[0], rollout.completion_ids[row])
    assert torch.equal(
        rollout.completion_ids[0], theirs("sequences")[0, 12:].long()
    )  # the row without padding


# --- timestep sampling

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


def masking_case(golden: Path, name: str) -> tuple[dict[str, Any], Rollout]:
    cases, tensors = record(golden / "masking", "masking")
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


def test_no_masking_case_is_left_out(golden: Path):
    cases, _ = record(golden / "masking", "masking")
    assert {case["name"] for case in cases["cases"]} == {*SEQUENTIAL, *MASKS, *MASKING_EXCEPTIONS}


@pytest.mark.parametrize("name", MASKING_EXCEPTIONS)
def test_probabilities_that_were_not_recorded_are_refused(golden: Path, name: str):
    _, rollout = masking_case(golden, name)
    with pytest.raises(ConfigError, match="token_probs is missing, or 0 at all valid"):
        WeightedSampler().weights(rollout)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_candidates_and_weights(golden: Path, name: str):
    case, rollout = masking_case(golden, name)
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
def test_timesteps_are_drawn_with_the_recorded_probabilities(golden: Path, name: str):
    case, rollout = masking_case(golden, name)
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


def test_the_largest_weights_at_temperature_zero_are_theirs(golden: Path):
    case, rollout = masking_case(golden, "llada_few_T0_k6")
    plan = WeightedSampler(k=6, temperature=0).plan(rollout, torch.Generator().manual_seed(0))
    ours = torch.where(plan.current, rollout.step_map, -1).amax(dim=2).T.sort(dim=1).values
    for run in case["runs"]:
        assert torch.equal(ours, torch.tensor(run["step_ids"]).sort(dim=1).values)


def test_uniform_is_the_weighted_sampler_at_infinite_temperature(golden: Path):
    _, rollout = masking_case(golden, "llada_Tinf")
    plans = [
        sampler.plan(rollout, torch.Generator().manual_seed(3))
        for sampler in (UniformSampler(k=4), WeightedSampler(k=4, temperature=float("inf")))
    ]
    assert torch.equal(plans[0].masked, plans[1].masked)


@pytest.mark.parametrize("name", MASKS)
def test_random_and_coupled_masks_cover_as_many_tokens(golden: Path, name: str):
    case, rollout = masking_case(golden, name)
    _, tensors = record(golden / "masking", "masking")
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


# --- losses

MAIN_LOSSES = tuple(
    f"main_{reduction}_{rest}"
    for reduction in ("token", "sample")
    for rest in (
        "thr0_beta0_it1",
        "thr0_beta0.04k1_it2",
        "thr0_beta0.04k3_it1",
        "thr0.2_beta0_it2",
        "thr0.2_beta0.04k2_it1",
        "thr0.2_beta0.04k3_it2",
        "thr0.6_beta0.04k1_it1",
        "thr0.6_beta0.04k2_it2",
    )
)
LOSSES = (
    *MAIN_LOSSES,
    "dummy_token_thr0.6_beta0.04k3_it1",
    "dummy_token_thr0.6_beta0.04k3_it2",
    "entropy_ref_token",
    "clip_asym_token_it2",
    "step0_sample_thr0_beta0.04k3_it1",
    "step0_sample_thr0_beta0.04k3_it2",
    "entropy_noref_sample",
    "beta_without_ref_sample",
)


def test_no_loss_is_left_out(golden: Path):
    cases, _ = record(golden / "loss", "llada")
    # METHOD 7.3: losses over left-padded prompts attend to the padding; those cases would be the exceptions.
    assert {case["name"] for case in cases["cases"] if case["data"] != "leftpad"} == set(LOSSES)


def loss_inputs(
    golden: Path, schedule: str, advantages: Tensor | None = None
) -> tuple[Rollout, TimestepPlan]:
    _, tensors = record(golden / "loss", "llada")
    prompt_ids = tensors["base.prompt_ids"].long()
    rollout = Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
        completion_ids=tensors["base.completion_ids"].long(),
        completion_mask=tensors["base.completion_mask"].bool(),
        step_map=tensors["base.step_map"].long(),
        advantages=tensors["advantages"].float() if advantages is None else advantages,
    )
    masked = tensors[f"sched.{schedule}.should_mask"].bool()
    plan = TimestepPlan(
        masked=masked,
        current=tensors[f"sched.{schedule}.current_pos"].bool(),
        weight=masked.any(dim=2).float(),
    )
    return rollout, plan


def loss_config(training: dict[str, Any]) -> LossConfig:
    return LossConfig(
        tau=training["low_prob_threshold"],
        beta=training["beta"],
        kl=training["kl_type"],
        eps_low=training.get("epsilon_low", 0.2),
        eps_high=training.get("epsilon_high", 0.2),
        entropy_coeff=training.get("entropy_coeff", 0.0),
        normalisation=training["loss_norm"],
    )


@pytest.mark.parametrize("schedule", ["main", "with_dummy", "with_step0"])
def test_log_probabilities(golden: Path, models: SimpleNamespace, schedule: str):
    _, tensors = record(golden / "loss", "llada")
    rollout, plan = loss_inputs(golden, schedule)
    batch = masked_batch(rollout, plan, models.current.mask_token_id)
    for name, model in (("cur", models.current), ("ref", models.reference), ("old", models.old)):
        with torch.no_grad():
            ours = token_logprobs(model, batch).logp
            # METHOD 7.6: theirs are normalised over all tokens, ours over the legal ones, without the mask
            # token, to which the reference gives 1.5 % at one position.
            probs = model.logits(batch.input_ids)[:, -ours.shape[1] :].softmax(dim=-1)
        ours = ours + (-probs[:, :, model.mask_token_id]).log1p() * batch.scored
        theirs = tensors[f"{name}_logps.{schedule}.base"][batch.slot, batch.row]
        torch.testing.assert_close(ours, theirs * batch.scored, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_loss(golden: Path, models: SimpleNamespace, name: str):
    cases, tensors = record(golden / "loss", "llada")
    number = next(i for i, case in enumerate(cases["cases"]) if case["name"] == name)
    case = cases["cases"][number]
    config, metrics = loss_config(case["training"]), case["metrics"]
    rollout, plan = loss_inputs(golden, case["schedule"])
    batch = masked_batch(rollout, plan, models.current.mask_token_id)
    with torch.no_grad():
        old = token_logprobs(models.old, batch) if case["uses_old_logps"] else None
        reference = token_logprobs(models.reference, batch, entropy=True) if case["ref_model"] else None
    models.current.zero_grad()
    found = rldf_loss(
        token_logprobs(models.current, batch, entropy=True), batch, config, old=old, reference=reference
    )
    found.loss.backward()

    close(found.loss, metrics["mean_loss"], "loss")
    close(found.parts["ratio"], metrics["mean_ratio"], "ratio")
    close(found.parts["entropy"], metrics["mean_entropy"], "entropy")
    if config.entropy_coeff == 0:  # theirs counts the entropy term with the policy's
        close(found.parts["policy"], metrics["mean_adv_loss"], "policy")
    if reference is not None and config.beta:
        close(found.parts["kl"], metrics["mean_kl_loss"], "kl")
    assert found.num_kept == metrics["total_mask_sum"]

    gradients = {key: parameter.grad for key, parameter in models.current.named_parameters()}
    assert set(gradients) == set(cases["param_names"])
    norms = torch.stack([gradients[key].norm() for key in cases["param_names"]])
    close(norms.double().norm(), case["total_grad_norm"], "total gradient norm")
    close(norms, tensors["grad_norms"][number], "gradient norms")
    for key, theirs in tensors.items():
        kind, _, parameter = key.partition(f".{name}.")
        if parameter:
            ours = gradients[parameter]
            ours = ours.norm(dim=1) if kind == "grad_rownorms" else ours
            # A tensor's small entries carry the rounding of its large ones.
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_the_recorded_gradients_belong_to_tested_losses(golden: Path):
    cases, tensors = record(golden / "loss", "llada")
    parameters = [
        key.partition(".model.") for key in tensors if key.startswith("grad") and key != "grad_norms"
    ]
    assert {case.partition(".")[2] for case, _, _ in parameters} <= set(LOSSES)
    assert len(parameters) == 6 * len(cases["full_gradient_params"]) + 3


def test_clip_fraction_counts_the_clipped(golden: Path, models: SimpleNamespace):
    """METHOD 7.8: theirs counts the tokens whose unclipped term is the smaller one."""
    cases, tensors = record(golden / "loss", "llada")
    for case in cases["cases"]:
        if case["data"] == "leftpad" or not case["uses_old_logps"]:
            continue
        config = loss_config(case["training"])
        rollout, plan = loss_inputs(golden, case["schedule"])
        batch = masked_batch(rollout, plan, models.current.mask_token_id)
        with torch.no_grad():
            old = token_logprobs(models.old, batch)
            found = rldf_loss(token_logprobs(models.current, batch), batch, config, old=old)
        clipped, unclipped = (recorded_clips(tensors, case, config, want) for want in (True, False))
        close(found.parts["clip_fraction"], clipped, f"{case['name']}: clipped")
        close(case["metrics"]["mean_clip"], unclipped, f"{case['name']}: what theirs counts")
        assert abs(clipped - unclipped) > 1e-2


def recorded_clips(
    tensors: dict[str, Tensor], case: dict[str, Any], config: LossConfig, clipped: bool
) -> float:
    """Share of the kept tokens that the PPO clip decides (or that lie beyond its other border), in loops."""
    schedule = case["schedule"]
    current, old = (tensors[f"{name}_logps.{schedule}.base"] for name in ("cur", "old"))
    masked = tensors[f"sched.{schedule}.should_mask"].bool() & tensors["base.completion_mask"].bool()
    now = tensors[f"sched.{schedule}.current_pos"].bool()
    shares = []
    for k in range(len(masked)):
        hits, kept = [0] * 4, [0] * 4
        for n, c in masked[k].nonzero().tolist():
            if old[k, n, c].exp() < config.tau and not now[k, n, c]:
                continue
            kept[n] += 1
            ratio = (current[k, n, c] - old[k, n, c]).exp()
            advantage = tensors["advantages"][n]
            above, below = ratio > 1 + config.eps_high, ratio < 1 - config.eps_low
            beyond = above if (advantage > 0) == clipped else below
            hits[n] += int(beyond and advantage != 0)
        if config.normalisation == "token":
            shares.append(sum(hits) / max(sum(kept), 1))
        else:
            shares.append(sum(h / max(m, 1) for h, m in zip(hits, kept, strict=True)) / 4)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("number", range(4))
def test_from_rewards_to_the_reported_result(golden: Path, models: SimpleNamespace, number: int):
    cases, _ = record(golden / "loss", "llada")
    assert len(cases["compute_loss_wrapper"]) == 4
    case = cases["compute_loss_wrapper"][number]
    advantages = group_advantages(torch.tensor(case["rewards"]), case["num_generations"])
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), rtol=1e-5, atol=1e-5)
    rollout, plan = loss_inputs(golden, "main", advantages)
    batch = masked_batch(rollout, plan, models.current.mask_token_id)
    with torch.no_grad():
        found = rldf_loss(
            token_logprobs(models.current, batch, entropy=True),
            batch,
            loss_config(case["training"]),
            reference=token_logprobs(models.reference, batch),
        )
    theirs = case["result"]
    close(found.loss, theirs["loss"], "loss")
    for part, key in (
        ("policy", "adv_loss"),
        ("kl", "mean_kl"),
        ("entropy", "mean_entropy"),
        ("ratio", "mean_ratio"),
        ("clip_fraction", "clip_ratio"),
    ):
        close(found.parts[part], theirs[key], part)
    # Theirs is out of all valid tokens of the k noisy states, masked or not.
    num_valid = len(plan.weight) * rollout.completion_mask.sum()
    close(found.num_kept / num_valid, theirs["effective_positions_ratio"], "kept")
