import pytest
import torch

from drift.contract import ConfigError, Rollout
from drift.samplers import ProportionalSampler


def rollout(steps: list, probs: list | None, valid: list | None = None) -> Rollout:
    step_map = torch.tensor(steps)
    return Rollout(
        prompt_ids=torch.zeros(len(steps), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(steps), 1, dtype=torch.bool),
        completion_ids=torch.full_like(step_map, 5),
        completion_mask=torch.ones_like(step_map).bool() if valid is None else torch.tensor(valid).bool(),
        step_map=step_map,
        token_probs=None if probs is None else torch.tensor(probs),
        seeds=torch.arange(len(steps)),
    )


ROW = rollout([[0, 0, 1, 2, 3, 4]], [[0.5, 0.7, 0.9, 1.0, 0.2, 0.4]], [[1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("k", [1, 2, 3, 6, 100])
def test_estimates_are_unbiased_over_every_start(monkeypatch: pytest.MonkeyPatch, k: int):
    """On a fine grid of systematic starts the mean estimate is the mean over the row's four candidates."""
    num = 20_000
    source = ROW.select(torch.zeros(num, dtype=torch.int64))
    starts = (torch.arange(num, dtype=torch.float64)[:, None] + 0.5) / num
    monkeypatch.setattr("drift.samplers.proportional.draws", lambda *_: starts)
    plan = ProportionalSampler(k=k).plan(source)
    steps = torch.where(plan.current, source.step_map, -1).amax(dim=2)
    num_states = (plan.weight > 0).sum(dim=0)
    assert (num_states >= 1).all()
    assert (num_states <= min(k, 4)).all()
    values = torch.tensor([3.0, -1.0, 0.5, 8.0, 0.0])
    estimates = (plan.weight * values[steps]).sum(dim=0) / num_states
    assert estimates.double().mean().item() == pytest.approx(2.625, abs=5e-3)
    if k == 100:  # all are certain
        torch.testing.assert_close(estimates, torch.full((num,), 2.625))
    for draw in steps.T[:: num // 50]:
        kept = draw[draw >= 0]
        assert len(kept.unique()) == len(kept)


def test_a_timestep_that_decides_costs_one_pass():
    # Sizes 0.9, 0 and 0 have the mean 0.3, of which 0.01 is added: 4 * 0.003 / 0.909 = 0.013 of the others.
    source = rollout([[0, 1, 2]], [[0.1, 1.0, 1.0]]).select(torch.zeros(1000, dtype=torch.int64))
    plan = ProportionalSampler(k=4, floor=0.01).plan(source, torch.Generator().manual_seed(0))
    assert plan.current[:, :, 0].any(dim=0).all()
    assert (plan.weight > 0).sum().item() == pytest.approx(1000 * (1 + 2 * 0.0132), abs=30)


def test_a_rows_plan_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 9, (8, 12), generator=generator)
    source = rollout(steps.tolist(), torch.rand(8, 12, generator=generator).tolist())
    for k in (1, 3, 12):
        sampler = ProportionalSampler(k=k)
        whole = sampler.plan(source)
        for row in range(8):
            alone = sampler.plan(source.select(torch.tensor([row])))
            assert torch.equal(alone.masked[:, 0], whole.masked[:, row])
            assert torch.equal(alone.weight[:, 0], whole.weight[:, row])


def test_a_row_without_a_valid_token_has_no_state():
    plan = ProportionalSampler(k=2).plan(
        rollout([[0, 1], [0, 1]], [[0.0, 0.0], [0.5, 0.5]], [[0, 0], [1, 1]])
    )
    assert plan.weight.T.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_a_row_of_certain_tokens_is_drawn_uniformly():
    source = rollout([[0, 1, 2, 3]], [[1.0] * 4]).select(torch.zeros(4000, dtype=torch.int64))
    plan = ProportionalSampler(k=2).plan(source, torch.Generator().manual_seed(0))
    assert torch.allclose(plan.weight, torch.ones(2, 4000))


@pytest.mark.parametrize("settings", [{"k": 0}, {"floor": 0.0}, {"floor": float("nan")}])
def test_settings_out_of_range_are_refused(settings: dict):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} is "):
        ProportionalSampler(**settings)


def test_probabilities_that_were_not_recorded_are_refused():
    with pytest.raises(ConfigError, match="token_probs is missing"):
        ProportionalSampler().plan(rollout([[0, 1]], None))


def test_sizes_worked_by_hand():
    # sqrt(0.5^2 + 0.3^2) = 0.58310, 0.1, 0, 0.8, and timestep 4 committed padding alone. Their mean is
    # 1.4831 / 4 = 0.370774, of which 0.5 is added to each.
    found = ProportionalSampler(k=2, floor=0.5).sizes(ROW)
    expected = torch.tensor([[0.768482, 0.285387, 0.185387, 0.985387, 0.0]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
