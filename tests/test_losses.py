import itertools
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from drift.contract import ConfigError, MaskedBatch, Rollout, TimestepPlan, TokenLogProbs
from drift.logprobs import token_logprobs
from drift.losses import KL, LossConfig, kept_per_slot, kept_tokens, kl_estimate, rldf_loss
from drift.masking import masked_batch
from drift.models import LLaDA
from drift.samplers import WeightedSampler

PARTS = ("policy", "kl", "entropy", "ratio", "clip_fraction")


def make_rollout(seed: int, num: int = 4, length: int = 8) -> Rollout:
    """Rows of unlike lengths; the last has no valid token, so that its timesteps are missing."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(num, length, generator=generator) < 0.8
    valid[-1] = False
    return Rollout(
        prompt_ids=torch.randint(2, 48, (num, 5), generator=generator),
        prompt_mask=torch.arange(5) >= torch.randint(0, 4, (num, 1), generator=generator),
        completion_ids=torch.randint(2, 48, (num, length), generator=generator).masked_fill(~valid, 0),
        completion_mask=valid,
        step_map=torch.randint(0, 4, (num, length), generator=generator),
        token_probs=torch.rand(num, length, generator=generator).clamp(min=0.01),
        advantages=torch.randn(num, generator=generator),
        commit_probs=torch.rand(num, length, generator=generator).clamp(min=0.01),
    )


def dense(values: Tensor, batch: MaskedBatch, plan: TimestepPlan) -> Tensor:
    """[M,C] values of the noisy states at their places in the plan, [K,N,C]."""
    return torch.zeros(plan.masked.shape).index_put((batch.slot, batch.row), values)


def plan_for(rollout: Rollout, seed: int) -> TimestepPlan:
    plan = WeightedSampler(k=3).plan(rollout, torch.Generator().manual_seed(seed))
    # One more row misses two of its timesteps.
    plan.weight = plan.weight.clone()
    plan.weight[1:, 0] = 0
    plan.weight[0] *= 1.5
    return plan


OPTIONS = [
    LossConfig(
        tau=tau,
        beta=beta,
        kl=kl,
        eps_low=eps_low,
        eps_high=0.28,
        entropy_coeff=coeff,
        normalisation=normalisation,
    )
    for tau, (beta, kl), (eps_low, coeff), normalisation in itertools.product(
        (0.0, 0.02, 0.6),
        ((0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")),
        ((0.2, 0.0), (0.1, 0.5)),
        ("token", "sample"),
    )
]
OPTIONS += [
    LossConfig(tau=tau, beta=beta, normalisation=normalisation, token_weight=weight)
    for tau, beta, normalisation, weight in (
        (None, 0.3, "token", 1.0),
        (None, 0.0, "sample", 0.5),
        (None, 0.3, "trajectory", 1.0),
        (0.02, 0.3, "trajectory", 2.0),
    )
]
OPTIONS += [
    LossConfig(tau=0.02, beta=beta, normalisation=normalisation, importance_cap=cap)
    for beta, normalisation, cap in itertools.product((0.0, 0.3), ("token", "sample"), (1.0, 1.3, 1e6))
]


# Commits are worked by hand, and in the walk through all trajectories.
TAKEN = set(LossConfig.__dataclass_fields__) - {"commit_weight", "negative_weight"}


def name(config: LossConfig) -> str:
    cap = "" if config.importance_cap is None else f"-cap{config.importance_cap}"
    cap += "" if config.token_weight == 1 else f"-weight{config.token_weight}"
    return f"tau{config.tau}-{config.beta}{config.kl}-H{config.entropy_coeff}-{config.normalisation}{cap}"


@pytest.fixture(scope="module")
def models(make_policy: Callable[..., LLaDA]) -> tuple[LLaDA, LLaDA, LLaDA]:
    """Policy, old policy and reference: each a little apart."""
    policies = [make_policy(init_std=0.3) for _ in range(3)]
    for seed, other in enumerate(policies[1:]):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policies[0], policies[1], policies[2]


@pytest.mark.parametrize("several", [False, True], ids=["one update", "several"])
@pytest.mark.parametrize("config", OPTIONS, ids=name)
def test_the_oracle_agrees_gradients_included(
    oracle: ModuleType, models: tuple[LLaDA, LLaDA, LLaDA], config: LossConfig, several: bool
):
    policy, old_policy, reference_policy = models
    seed = OPTIONS.index(config) % 7
    rollout = make_rollout(seed)
    plan = plan_for(rollout, seed)
    batch = masked_batch(rollout, plan, policy.mask_token_id)
    with torch.no_grad():
        old = token_logprobs(old_policy, batch) if several else None
        reference = token_logprobs(reference_policy, batch, entropy=True) if seed % 3 else None
    results, gradients = [], []
    for use_oracle in (False, True):
        now = token_logprobs(policy, batch, entropy=True)
        if use_oracle:
            found = oracle.loss(
                logp=dense(now.logp, batch, plan),
                entropy=dense(now.entropy, batch, plan),
                old=None if old is None else dense(old.logp, batch, plan),
                reference=None if reference is None else dense(reference.logp, batch, plan),
                reference_entropy=None if reference is None else dense(reference.entropy, batch, plan),
                masked=plan.masked,
                current=plan.current,
                weight=plan.weight,
                valid=rollout.completion_mask,
                advantages=rollout.advantages,
                commit_logp=dense(batch.commit_logp, batch, plan),
                num_timesteps=plan.num_timesteps,
                **{field: getattr(config, field) for field in config.__dataclass_fields__ if field in TAKEN},
            )
        else:
            output = rldf_loss(now, batch, config, old=old, reference=reference)
            found = {"loss": output.loss, **output.parts}
        policy.zero_grad()
        found["loss"].backward()
        results.append({key: value.item() for key, value in found.items()})
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    for key, value in results[0].items():
        assert value == pytest.approx(results[1][key], rel=1e-5, abs=1e-6), key
    assert set(results[0]) >= {"loss", "policy", "ratio", "clip_fraction", "entropy"}
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    assert gradients[1].norm() > 0


def test_the_oracle_sees_clipping_and_dropping(models: tuple[LLaDA, LLaDA, LLaDA]):
    """The agreement above would say little if nothing were clipped or dropped."""
    policy, old_policy, _ = models
    batch = masked_batch(make_rollout(0), plan_for(make_rollout(0), 0), policy.mask_token_id)
    with torch.no_grad():
        now, old = token_logprobs(policy, batch), token_logprobs(old_policy, batch)
    found = rldf_loss(now, batch, LossConfig(tau=0.02), old=old)
    assert 0 < found.num_kept < found.num_scored
    assert 0.02 < found.parts["clip_fraction"] < 0.9
    assert batch.current.sum() < found.num_kept


def make_batch(
    scored: list[list[int]],
    current: list[list[int]],
    advantages: list[float],
    slot: list[int] | None = None,
    row: list[int] | None = None,
    num_slots: int = 1,
    commit_probs: list[list[float]] | None = None,
) -> MaskedBatch:
    """Noisy states of which only what the loss reads is filled in."""
    good = torch.tensor(scored).bool()
    num = len(good)
    rows = torch.tensor(row or list(range(num)))
    return MaskedBatch(
        input_ids=torch.zeros_like(good).long(),
        attention_mask=torch.ones_like(good),
        targets=torch.zeros_like(good).long(),
        scored=good,
        current=torch.tensor(current).bool(),
        weight=torch.ones(num),
        row_share=1.0 / rows.bincount()[rows],
        slot=torch.tensor(slot or [0] * num),
        row=rows,
        advantages=torch.tensor(advantages),
        num_slots=num_slots,
        commit_logp=None if commit_probs is None else torch.tensor(commit_probs).log(),
    )


def logs(*probs: list[float]) -> TokenLogProbs:
    return TokenLogProbs(logp=torch.tensor(probs).log())


def test_reinforce_worked_by_hand():
    batch = make_batch([[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 0, 1]], [2.0, -1.0])
    probs = logs([0.1, 0.5, 1.0], [0.8, 0.3, 0.2])
    # tau 0.4 keeps 0.1 (current) and 0.5 in row 0, 0.8 and 0.2 (current) in row 1.
    assert kept_tokens(probs, batch, 0.4).long().tolist() == [[1, 1, 0], [1, 0, 1]]
    first = -2 * (math.log(0.1) + math.log(0.5))  # 5.9915
    second = math.log(0.8) + math.log(0.2)  # -1.8326
    by_token = rldf_loss(probs, batch, LossConfig(tau=0.4))
    assert by_token.loss.item() == pytest.approx((first + second) / 4, rel=1e-5)
    assert (by_token.num_kept.item(), by_token.num_scored.item()) == (4, 5)
    by_row = rldf_loss(probs, batch, LossConfig(tau=0.4, normalisation="sample"))
    assert by_row.loss.item() == pytest.approx((first / 2 + second / 2) / 2, rel=1e-5)


def test_the_mean_over_timesteps_is_the_last():
    # Slot 0: rows 0 and 1, three tokens; slot 1: row 0 alone, one token. A = 1, all probabilities e^-1.
    batch = make_batch([[1, 1], [1, 0], [1, 0]], [[0, 0]] * 3, [1.0, 1.0, 4.0], [0, 0, 1], [0, 1, 0], 2)
    probs = TokenLogProbs(logp=torch.full((3, 2), -1.0))
    assert kept_per_slot(batch.scored, batch).tolist() == [3, 1]
    # token: (3/3 + 4/1) / 2; sample: row 0 has (1 + 4) / 2, row 1 has 1.
    assert rldf_loss(probs, batch, LossConfig(tau=0)).loss.item() == pytest.approx(2.5)
    by_row = rldf_loss(probs, batch, LossConfig(tau=0, normalisation="sample"))
    assert by_row.loss.item() == pytest.approx((2.5 + 1) / 2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (1.1, 2.0, 2.2, 0),
        (1.5, 2.0, 2.56, 1),  # 1.28 * 2
        (0.5, 2.0, 1.0, 0),  # pessimistic: the smaller of 0.5 * 2 and 0.9 * 2
        (0.95, -2.0, -1.9, 0),
        (0.5, -2.0, -1.8, 1),  # 0.9 * -2
        (1.5, -2.0, -3.0, 0),
        (1.5, 0.0, 0.0, 0),
    ],
)
def test_the_ppo_clip(ratio: float, advantage: float, objective: float, clipped: int):
    batch = make_batch([[1]], [[1]], [advantage])
    now = TokenLogProbs(logp=torch.tensor([[math.log(0.4 * ratio)]], requires_grad=True))
    found = rldf_loss(now, batch, LossConfig(eps_low=0.1, eps_high=0.28), old=logs([0.4]))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-objective, abs=1e-5)
    assert found.parts["clip_fraction"].item() == clipped
    assert found.parts["ratio"].item() == pytest.approx(ratio, rel=1e-5)
    # d(-ratio A) / d logp = -ratio A, unless it was clipped.
    assert now.logp.grad.item() == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_importance_weights_worked_by_hand(several: bool):
    # The rollout gave the two current tokens 0.2 and 0.8; 1 stands where another timestep committed.
    batch = make_batch([[1, 1, 1]], [[1, 1, 0]], [2.0], commit_probs=[[0.2, 0.8, 1.0]])
    now = logs([0.5, 0.4, 0.9])
    now.logp.requires_grad_()
    # The weights of the rollout gave 0.5 and 0.4 as well: 0.5 / 0.2 = 2.5, cut to 2, and 0.4 / 0.8 = 0.5.
    old = logs([0.5, 0.4, 0.9]) if several else None
    config = LossConfig(tau=0, importance_cap=2.0, beta=0.3, kl="k1")
    found = rldf_loss(now, batch, config, old=old, reference=logs([0.25, 0.4, 0.9]))
    found.loss.backward()
    # REINFORCE: -2 log p; PPO: -2 * ratio, which is 1.
    terms = [-2.0, -2.0, -2.0] if several else [-2 * math.log(p) for p in (0.5, 0.4, 0.9)]
    policy = (2 * terms[0] + 0.5 * terms[1] + terms[2]) / 3
    kl = math.log(0.5 / 0.25) / 3
    assert found.parts["policy"].item() == pytest.approx(policy, rel=1e-5)
    # The KL is not weighted.
    assert found.parts["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert found.loss.item() == pytest.approx(policy + 0.3 * kl, rel=1e-5)
    # d/dlogp of -2 w logp, or of -2 w ratio, and of the KL, 0.3 each; all over 3 tokens.
    expected = [(0.3 - 2 * weight) / 3 for weight in (2.0, 0.5, 1.0)]
    assert now.logp.grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert (found.mismatch.weight.item(), found.mismatch.num_capped.item()) == (pytest.approx(2.5), 1)
    assert found.mismatch.max_ratio.item() == pytest.approx(2.5)


def test_with_several_updates_the_weights_that_made_the_rollout_decide():
    batch = make_batch([[1]], [[1]], [1.0], commit_probs=[[0.2]])
    config = LossConfig(importance_cap=10.0, eps_high=0.5)
    # The policy moved on to 0.36, a ratio of 1.2; the weight stays 0.3 / 0.2, the figures too.
    found = rldf_loss(logs([0.36]), batch, config, old=logs([0.3]))
    assert found.parts["policy"].item() == pytest.approx(-1.2 * 1.5, rel=1e-5)
    assert found.mismatch.kl.item() == pytest.approx(1.5 - 1 - math.log(1.5), rel=1e-4)


@pytest.mark.parametrize("several", [False, True])
def test_weighted_tokens_of_the_rollout_give_the_gradient_of_the_update(several: bool):
    """Every token of a categorical policy, as often as the rollout draws it: exact, without sampling."""
    rollout = torch.tensor([0.4, 0.3, 0.2, 0.1])
    rewards = [1.0, -0.5, 2.0, 0.25]
    logits = torch.tensor([0.1, 0.9, -0.6, 0.4], requires_grad=True)
    # The gradient of -E[reward], the tokens drawn under the probabilities of the update.
    (expected,) = torch.autograd.grad(-(logits.softmax(0) * torch.tensor(rewards)).sum(), logits)
    batch = make_batch([[1]] * 4, [[1]] * 4, rewards, commit_probs=rollout[:, None].tolist())
    batch.weight = rollout

    def gradient(cap: float | None) -> Tensor:
        now = TokenLogProbs(logp=logits.log_softmax(0)[:, None])
        old = now.detach() if several else None
        config = LossConfig(tau=0, importance_cap=cap)
        found = rldf_loss(now, batch, config, old=old, num_kept=torch.tensor([1.0]))
        return torch.autograd.grad(found.loss, logits)[0]

    torch.testing.assert_close(gradient(1e6), expected, rtol=1e-5, atol=1e-6)
    # Without weights, or cut at 1, it is another one: the largest ratio here is 0.266 / 0.1.
    assert (gradient(None) - expected).norm() > 0.2 * expected.norm()
    assert (gradient(1.0) - expected).norm() > 0.1 * expected.norm()


def test_importance_weights_need_the_probabilities_of_the_rollout():
    with pytest.raises(ConfigError, match=r"importance_cap is 2\.0: .*commit_probs"):
        rldf_loss(logs([0.5]), make_batch([[1]], [[1]], [1.0]), LossConfig(importance_cap=2.0))


@pytest.mark.parametrize(
    ("settings", "num_updates", "names"),
    [
        ({}, 1, ["policy"]),
        ({"beta": 0.1}, 1, ["policy", "kl"]),
        ({"entropy_coeff": -0.1}, 2, ["policy", "entropy", "ratio", "clip_fraction"]),
    ],
)
def test_parts_that_say_something(settings: dict, num_updates: int, names: list[str]):
    assert LossConfig(**settings).part_names(num_updates) == names


@pytest.mark.parametrize(("kind", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.10653)])
def test_kl_worked_by_hand(kind: KL, expected: float):
    # d = reference - policy = -0.5: -d, d^2 / 2, e^-0.5 - 1 + 0.5 = 0.60653 - 0.5.
    found = kl_estimate(torch.tensor(-1.0), torch.tensor(-1.5), kind)
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_unbiased_estimators_average_to_the_kl(kind: KL):
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (policy * (policy / reference).log()).sum()
    mean = (policy * kl_estimate(policy.log(), reference.log(), kind)).sum()
    torch.testing.assert_close(mean, exact)


def test_old_probabilities_decide_what_is_kept():
    batch = make_batch([[1, 1]], [[0, 0]], [1.0])
    found = rldf_loss(logs([0.9, 0.1]), batch, LossConfig(tau=0.5), old=logs([0.1, 0.9]))
    assert found.num_kept == 1
    assert found.parts["ratio"].item() == pytest.approx(0.1 / 0.9, rel=1e-5)


def test_the_threshold_itself_is_kept_and_one_keeps_only_the_current():
    batch = make_batch([[1, 1, 1]], [[0, 0, 1]], [1.0])
    assert kept_tokens(
        TokenLogProbs(logp=torch.tensor([[math.log(0.5), -0.7, -9.0]])), batch, 0.5
    ).tolist() == [[True, False, True]]
    assert kept_tokens(logs([0.99, 0.5, 0.1]), batch, 1.0).tolist() == [[False, False, True]]
    assert kept_tokens(logs([0.0, 0.0, 0.0]), batch, 0.0).all()


@pytest.mark.parametrize("normalisation", ["token", "sample"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole(
    models: tuple[LLaDA, LLaDA, LLaDA], normalisation: str, several: bool, size: int
):
    policy, old_policy, reference_policy = models
    rollout = make_rollout(3)
    batch = masked_batch(rollout, plan_for(rollout, 3), policy.mask_token_id)
    config = LossConfig(tau=0.02, beta=0.2, entropy_coeff=0.1, normalisation=normalisation)

    def loss_of(part: MaskedBatch, **whole: Tensor):
        with torch.no_grad():
            old = token_logprobs(old_policy, part) if several else None
            reference = token_logprobs(reference_policy, part, entropy=True)
        return rldf_loss(
            token_logprobs(policy, part, entropy=True), part, config, old=old, reference=reference, **whole
        )

    def gradient() -> Tensor:
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    policy.zero_grad()
    whole = loss_of(batch)
    whole.loss.backward()
    expected = gradient()
    with torch.no_grad():
        feedback = token_logprobs(old_policy if several else policy, batch)
    num_kept = kept_per_slot(kept_tokens(feedback, batch, config.tau), batch)
    num_rows = batch.row.unique().numel()
    policy.zero_grad()
    pieces = []
    # Rows and slots are torn apart.
    for states in torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)).split(size):
        pieces.append(loss_of(batch.select(states), num_kept=num_kept, num_rows=num_rows))
        pieces[-1].loss.backward()
    assert sum(p.loss.item() for p in pieces) == pytest.approx(whole.loss.item(), rel=1e-5)
    assert sum(p.num_kept.item() for p in pieces) == whole.num_kept.item()
    assert sum(p.num_scored.item() for p in pieces) == whole.num_scored.item()
    for part in PARTS:
        assert sum(p.parts[part].item() for p in pieces) == pytest.approx(
            whole.parts[part].item(), rel=1e-5, abs=1e-6
        )
    assert (gradient() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("value", [-math.inf, -1e30, 1e30, math.nan])
def test_what_stands_at_a_dropped_token_does_not_matter(value: float):
    batch = make_batch([[1, 1, 0]], [[1, 0, 0]], [1.5])
    config = LossConfig(tau=0.5, beta=0.1, entropy_coeff=0.1)
    results = []
    for dropped in (-5.0, value):
        # Position 1 is scored but below tau (by the old policy), position 2 is not scored.
        now = torch.tensor([[-1.0, dropped, dropped]], requires_grad=True)
        entropy = torch.tensor([[0.5, dropped, dropped]], requires_grad=True)
        found = rldf_loss(
            TokenLogProbs(logp=now, entropy=entropy),
            batch,
            config,
            old=TokenLogProbs(logp=torch.tensor([[-1.1, -3.0, dropped]])),
            reference=TokenLogProbs(
                logp=torch.tensor([[-1.2, dropped, dropped]]), entropy=torch.tensor([[0.7, dropped, dropped]])
            ),
        )
        found.loss.backward()
        results.append((found.loss.detach(), now.grad, entropy.grad))
    for plain, extreme in zip(*results, strict=True):
        assert torch.equal(plain, extreme)
    assert results[1][1][0].tolist()[1:] == [0.0, 0.0]


def test_a_batch_of_which_nothing_is_kept_has_no_loss():
    batch = make_batch([[1, 1]], [[0, 0]], [1.0])
    for normalisation in ("token", "sample"):
        now = TokenLogProbs(logp=torch.tensor([[-5.0, -6.0]], requires_grad=True))
        found = rldf_loss(now, batch, LossConfig(tau=0.5, normalisation=normalisation))
        found.loss.backward()
        assert (found.loss.item(), found.num_kept.item(), found.num_scored.item()) == (0.0, 0, 2)
        assert (now.logp.grad == 0).all()


def test_an_empty_batch_has_no_loss():
    batch = make_batch([[1, 1]], [[1, 1]], [1.0]).select(torch.zeros(0, dtype=torch.int64))
    for normalisation in ("token", "sample"):
        found = rldf_loss(
            TokenLogProbs(logp=torch.zeros(0, 2)), batch, LossConfig(normalisation=normalisation)
        )
        assert found.loss.item() == 0.0


def test_parts_and_feedback_carry_no_graph():
    batch = make_batch([[1, 1]], [[1, 0]], [1.0])
    now = TokenLogProbs(logp=torch.tensor([[-0.1, -0.2]], requires_grad=True))
    found = rldf_loss(now, batch, LossConfig(), old=logs([0.9, 0.8]), reference=logs([0.9, 0.7]))
    assert found.loss.requires_grad
    assert not any(part.requires_grad for part in found.parts.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": -0.1}, r"tau is -0.1: set it to a probability in \[0, 1\]"),
        ({"tau": 1.1}, r"tau is 1.1"),
        ({"tau": math.nan}, r"tau is nan"),
        ({"beta": -0.1}, r"beta is -0.1: set it to 0 \(no reference\) or a positive number"),
        ({"beta": math.inf}, r"beta is inf"),
        ({"kl": "k4"}, r"kl is 'k4': choose one of \['k1', 'k2', 'k3'\]"),
        ({"eps_low": 1.0}, r"eps_low is 1.0: set it in \[0, 1\)"),
        ({"eps_low": -0.1}, r"eps_low is -0.1"),
        ({"eps_high": -0.1}, r"eps_high is -0.1: set it to 0 or more"),
        ({"eps_high": math.nan}, r"eps_high is nan"),
        ({"entropy_coeff": math.inf}, r"entropy_coeff is inf: set it to a finite number"),
        ({"importance_cap": 0.9}, r"importance_cap is 0.9: set it to a finite number of 1 or more, or null"),
        ({"importance_cap": math.inf}, r"importance_cap is inf"),
        ({"importance_cap": math.nan}, r"importance_cap is nan"),
        (
            {"normalisation": "batch"},
            r"normalisation is 'batch': choose one of \['token', 'sample', 'trajectory'\]",
        ),
    ],
)
def test_a_value_outside_its_range_is_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**settings)


def decided_batch(**changes) -> MaskedBatch:
    """Two states of one row, three positions: a draw that commits and one that does not; then the surest."""
    fields = {
        "input_ids": torch.zeros(2, 4, dtype=torch.int64),
        "attention_mask": torch.ones(2, 4, dtype=torch.bool),
        "targets": torch.zeros(2, 3, dtype=torch.int64),
        "scored": torch.tensor([[True, False, False], [False, True, False]]),
        "current": torch.tensor([[True, False, False], [False, True, False]]),
        "weight": torch.ones(2),
        "row_share": torch.full((2,), 0.5),
        "slot": torch.tensor([0, 1]),
        "row": torch.tensor([0, 0]),
        "advantages": torch.tensor([2.0, 2.0]),
        "num_slots": 2,
        "num_timesteps": torch.tensor([3.0, 3.0]),
        "decision": torch.tensor([[1, -1, 0], [0, -1, 0]]),
        "commit_rule": torch.tensor([[0.9, 0.1], [0.9, 0.1]]),
    }
    return MaskedBatch(**fields | changes)


def decided_logprobs(*top: float) -> TokenLogProbs:
    """Committed tokens of probability 1/2; likeliest tokens where draws decided."""
    first, second, third = (math.log(p) for p in top)
    half = math.log(0.5)
    return TokenLogProbs(
        logp=torch.tensor([[half, 0.0, 0.0], [0.0, half, 0.0]]),
        top=torch.tensor([[first, second, 0.0], [0.0, third, 0.0]], requires_grad=True),
    )


@pytest.mark.parametrize(
    ("normalisation", "factor"),
    # A state's share: token 1 / (2 slots x 1 token), sample 1/2 / 1 token, trajectory 1/2 x 3 timesteps.
    [("token", 0.5), ("sample", 0.5), ("trajectory", 1.5)],
)
def test_commits_worked_by_hand(normalisation, factor):
    found = decided_logprobs(0.95, 0.8, 0.7)
    config = LossConfig(tau=None, normalisation=normalisation, commit_weight=3.0)
    output = rldf_loss(found, decided_batch(), config)
    # q = sigmoid((m - 0.9) / 0.1): log sigmoid(0.5) + log sigmoid(1) in the first, log sigmoid(2) in the next
    decisions = -math.log1p(math.exp(-0.5)) - math.log1p(math.exp(-1.0)) - math.log1p(math.exp(-2.0))
    assert output.parts["commit"].item() == pytest.approx(-2.0 * factor * 3.0 * decisions)
    assert output.parts["policy"].item() == pytest.approx(-2.0 * factor * 2 * math.log(0.5))
    assert output.loss.item() == pytest.approx(sum(output.parts[n].item() for n in ("commit", "policy")))
    output.loss.backward()
    assert found.top is not None
    assert found.top.grad is not None
    # d log sigmoid((m - 0.9) / 0.1) / d log m = (1 - q) m / 0.1 of the draw that commits.
    slope = (1 - 1 / (1 + math.exp(-0.5))) * 0.95 / 0.1
    assert found.top.grad[0, 0].item() == pytest.approx(-2.0 * factor * 3.0 * slope, rel=1e-5)


def test_decisions_are_clipped_one_by_one():
    now, old = decided_logprobs(0.95, 0.8, 0.7), decided_logprobs(0.85, 0.8, 0.7)
    config = LossConfig(tau=None, normalisation="sample", token_weight=0.0)
    output = rldf_loss(now, decided_batch(), config, old=old)
    # The first decision's q rose from sigmoid(-0.5) = 0.378 to 0.622: its ratio of 1.65 is cut to 1.2.
    assert output.parts["commit"].item() == pytest.approx(-2.0 * 0.5 * (1.2 + 1 + 1))
    assert output.parts["policy"].item() == 0
    output.loss.backward()
    assert now.top is not None
    assert now.top.grad is not None
    assert (now.top.grad != 0).tolist() == [[False, True, False], [False, True, False]]


def test_what_did_worse_counts_by_its_weight():
    """Probabilities 1/2; advantages 2 and -1: -(2 log 1/2 - 0.25 log 1/2) / 2 tokens."""
    batch = make_batch([[1], [1]], [[1], [1]], [2.0, -1.0])
    found = rldf_loss(logs([0.5], [0.5]), batch, LossConfig(negative_weight=0.25))
    assert found.loss.item() == pytest.approx(-(2.0 - 0.25) * math.log(0.5) / 2)


def test_draws_that_a_plan_does_not_replay_have_no_likelihood():
    batch = decided_batch(decision=None)
    with pytest.raises(ConfigError, match=r"commit_weight is 1.0: .*TimestepPlan.replay is False"):
        rldf_loss(decided_logprobs(0.9, 0.9, 0.9), batch, LossConfig())


def test_tokens_of_other_timesteps_don_t_count_with_tau_null(models):
    rollout = make_rollout(3)
    plan = plan_for(rollout, 3)
    wide = masked_batch(rollout, plan, 1)
    narrow = masked_batch(rollout, plan, 1, current_only=True)
    assert narrow.scored.sum() < wide.scored.sum()
    config = LossConfig(tau=None)
    losses = [rldf_loss(token_logprobs(models[0], b), b, config).loss.item() for b in (wide, narrow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
