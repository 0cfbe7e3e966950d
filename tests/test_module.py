import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

import drift.callbacks.rollout
import drift.module
from drift.callbacks import FeedbackCallback, RescueCallback, RolloutCallback
from drift.contract import ConfigError, PromptBatch, Rollout, SampleError
from drift.data import PromptDataModule
from drift.losses import LossConfig
from drift.models import load_policy
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.randomness import fold
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig
from drift.samplers import (
    CoupledElboSampler,
    FullSampler,
    ProportionalSampler,
    RandomMaskSampler,
    SandwichedSampler,
    TraceSampler,
    UniformSampler,
    WeightedSampler,
)

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)
CACHED = replace(DECODE, block_length=4, use_cache=True)
LR = 1e-5
# As they were before any recorder, of which a test may use several.
CLIP_GRADIENTS, TOKEN_LOGPROBS = drift.module.clip_gradients, drift.module.token_logprobs


class Recorder(Callback):
    """Keeps the batches with their rollouts, gradients before clipping, and weights after every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_score: Callable[[], None] | None = None) -> None:
        self.batches: list[PromptBatch] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.num_states: list[int] = []
        self.rows: list[set[int]] = []
        self.policy: torch.nn.Module

        def record_gradients(parameters, max_norm):
            self.gradients.append(
                {n: p.grad.clone() for n, p in self.policy.named_parameters() if p.grad is not None}
            )
            return CLIP_GRADIENTS(parameters, max_norm)

        def record_rows(policy, batch, **settings):
            self.num_states.append(len(batch))
            self.rows.append(set(batch.row.tolist()))
            if on_score is not None:
                on_score()
            return TOKEN_LOGPROBS(policy, batch, **settings)

        monkeypatch.setattr(drift.module, "clip_gradients", record_gradients)
        monkeypatch.setattr(drift.module, "token_logprobs", record_rows)

    def on_train_start(self, trainer, pl_module):
        self.policy = pl_module.policy

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(deepcopy(batch))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(snapshot(pl_module.policy))


def snapshot(policy: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters()}


@pytest.fixture
def train(
    tiny_folder: Path,
    spread_task,
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
):
    """Trains the tiny policy; gives back the module and what was recorded."""

    def run(
        steps: int = 1,
        callbacks: tuple[Callback, ...] = (),
        reward=None,
        on_score=None,
        precision="32-true",
        decode=DECODE,
        **settings,
    ):
        if reward is not None:
            spread_task.reward = reward
        settings = {
            "sampler": WeightedSampler(k=2),
            "optimizer": OptimizerConfig(lr=LR, gradient_clip=0.5),
        } | settings
        module = RLDFModule(str(tiny_folder), **settings)
        recorder = Recorder(monkeypatch, on_score)
        rollout = RolloutCallback(group_size=4, completion_length=16, decode=decode, evaluation=decode)
        trainer = make_trainer(steps, callbacks=[rollout, *callbacks, recorder], precision=precision)
        trainer.fit(module, datamodule=PromptDataModule(spread_task, prompts_per_step=3))
        return module, recorder

    return run


def plain_logprobs(policy, rollout: Rollout, masked: Tensor) -> Tensor:
    """[K,N,C] log-probabilities of the clean tokens, an unpadded pass for every noisy state."""
    rows = []
    for slot, row in product(range(masked.shape[0]), range(masked.shape[1])):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        state = torch.where(masked[slot, row], policy.mask_token_id, rollout.completion_ids[row])
        logits = policy.logits(torch.cat((prompt, state))[None])[0, len(prompt) :].clone()
        logits[:, policy.mask_token_id] = -torch.inf
        rows.append(logits.log_softmax(dim=-1)[torch.arange(len(state)), rollout.completion_ids[row]])
    return torch.stack(rows).unflatten(0, masked.shape[:2])


def plain_advantages(rewards: Tensor, group_size: int = 4) -> Tensor:
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    return torch.cat([(group - group.mean()) / max(float(group.std()), 1e-2) for group in groups])


def plain_training(
    oracle: ModuleType,
    folder: Path,
    rollout: Rollout,
    loss: LossConfig,
    num_updates: int,
    reference_folder: Path,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Gradients before clipping and weights after each of the updates of one rollout, computed slowly."""
    policy, first, reference = load_policy(folder), load_policy(folder), load_policy(reference_folder)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    gradients, weights = [], []
    for update in range(num_updates):
        keyed = replace(rollout, seeds=fold(rollout.seeds, -1, update))
        plan = WeightedSampler(k=2).plan(keyed)
        with torch.no_grad():
            old = plain_logprobs(first, rollout, plan.masked) if num_updates > 1 else None
            kl = plain_logprobs(reference, rollout, plan.masked) if loss.beta else None
        found = oracle.loss(
            logp=plain_logprobs(policy, rollout, plan.masked),
            masked=plan.masked,
            current=plan.current,
            valid=rollout.completion_mask,
            weight=plan.weight,
            advantages=plain_advantages(rollout.rewards.sum(dim=1)),
            tau=loss.tau,
            beta=loss.beta,
            kl=loss.kl,
            eps_low=loss.eps_low,
            eps_high=loss.eps_high,
            entropy_coeff=0.0,
            normalisation=loss.normalisation,
            old=old,
            reference=kl,
            importance_cap=loss.importance_cap,
            commit_logp=rollout.commit_probs.log().expand(plan.masked.shape),
        )
        optimizer.zero_grad()
        found["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters()})
        norm = torch.stack([p.grad.square().sum() for p in policy.parameters()]).sum().sqrt()
        for parameter in policy.parameters():
            parameter.grad *= min(1.0, 0.5 / float(norm))
        optimizer.step()
        weights.append(snapshot(policy))
    return gradients, weights


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-2, "nothing to compare"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * max(largest, 1.0), msg=name)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory, make_policy) -> Path:
    """A policy near the tiny one: a reference that it differs from at the start."""
    folder = tmp_path_factory.mktemp("other")
    policy = make_policy(vocab_size=98)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("tau", [0.0, 0.6])
@pytest.mark.parametrize("normalisation", ["token", "sample"])
def test_steps_are_those_of_the_plain_computation_at_any_micro_batch_size(
    train, oracle, tiny_folder, other_folder, normalisation: str, tau: float, beta: float, num_updates: int
):
    # Narrow clips, so that a learning rate of 1e-5 reaches them at the second update.
    loss = LossConfig(tau=tau, beta=beta, normalisation=normalisation, eps_low=1e-4, eps_high=2e-4)
    assert_plain_steps(train, oracle, tiny_folder, other_folder, loss, num_updates)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_weighted_steps_of_cached_rollouts_are_those_of_the_plain_computation(
    train, oracle, tiny_folder, other_folder, num_updates: int
):
    loss = LossConfig(tau=0.6, beta=0.3, importance_cap=1.2)
    assert_plain_steps(train, oracle, tiny_folder, other_folder, loss, num_updates, decode=CACHED)


EXACT = LossConfig(tau=None, normalisation="trajectory", eps_low=1e-4, eps_high=2e-4)
DRAWN = replace(DECODE, commit="stochastic", width=0.2)
LEVELS = {
    "commits": (FullSampler(), EXACT, DRAWN),
    "commits, cached": (ProportionalSampler(k=2), EXACT, replace(DRAWN, block_length=4, use_cache=True)),
    "commits alone": (FullSampler(), replace(EXACT, token_weight=0.0), replace(DRAWN, temperature=0.0)),
    "ESPO": (CoupledElboSampler(k=2), LossConfig(beta=0.3), DECODE),
    "SPG": (SandwichedSampler(k=3), LossConfig(), DECODE),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("num_updates", [1, 2])
def test_commits_and_whole_completions_do_not_depend_on_micro_batches(train, name: str, num_updates: int):
    sampler, loss, decode = LEVELS[name]
    settings = {"sampler": sampler, "loss": loss, "decode": decode, "num_updates": num_updates}
    figures: list[dict[str, float]] = []

    class Figures(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            figures.append({n: float(v) for n, v in trainer.callback_metrics.items() if "loss/" in n})

    results = [
        train(num_updates, callbacks=(Figures(),), micro_batch_size=size, **settings)[1]
        for size in (1000, 7, 1)
    ]
    for run, update in product((1, 2), range(num_updates)):
        assert_same_gradients(results[run].gradients[update], results[0].gradients[update])
        assert figures[run * num_updates + update] == pytest.approx(figures[update], rel=1e-4, abs=1e-6)
    assert ("loss/commit" in figures[0]) == ("commits" in name)
    assert figures[0]["loss/total"] != 0
    assert max(float(value.abs().max()) for value in results[0].gradients[0].values()) > 0


@pytest.mark.parametrize("sampler", [FullSampler(), TraceSampler(shrink=2)])
def test_rows_of_unlike_lengths_are_warned_of_where_slots_count_alike(sampler, recwarn):
    sampler.require_fits(LossConfig(normalisation="sample"))
    sampler.require_fits(LossConfig(normalisation="trajectory"))
    assert not recwarn
    with pytest.warns(UserWarning, match="normalisation is 'token', .* exact with sample or trajectory only"):
        sampler.require_fits(LossConfig(normalisation="token"))


def test_draws_of_commits_need_a_sampler_that_replays_them(train):
    with pytest.raises(ConfigError, match=r"model.sampler is RandomMaskSampler: .*commit_weight: 0"):
        train(sampler=RandomMaskSampler(), decode=DRAWN)
    train(sampler=RandomMaskSampler(), decode=DRAWN, loss=LossConfig(commit_weight=0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": ProportionalSampler()}, r"normalisation is 'token': ProportionalSampler weighs"),
        (
            {"sampler": WeightedSampler(importance_correction=True)},
            r"normalisation is 'token': WeightedSampler weighs .* set it to sample or trajectory",
        ),
        (
            {"sampler": UniformSampler(importance_correction=True)},
            r"normalisation is 'token': UniformSampler weighs",
        ),
        (
            {"sampler": RandomMaskSampler(), "loss": LossConfig(importance_cap=2.0)},
            r"importance_cap is 2.0: of the noisy states of RandomMaskSampler .* set it to null",
        ),
        ({"loss": LossConfig(token_weight=0.0)}, r"token_weight is 0: there is nothing to learn from but"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_rolled_out(train, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        train(**settings)


def test_nothing_is_computed_for_what_did_worse_where_its_weight_is_0(train):
    _, all_rows = train(loss=LossConfig())
    _, better = train(loss=LossConfig(negative_weight=0.0))
    advantages = plain_advantages(all_rows.batches[0].rollout.rewards.sum(dim=1))
    assert (advantages < 0).any()
    assert better.rows == [set((advantages > 0).nonzero()[:, 0].tolist())]
    assert all_rows.rows == [set((advantages != 0).nonzero()[:, 0].tolist())]


def assert_plain_steps(
    train, oracle, tiny_folder: Path, other_folder: Path, loss: LossConfig, num_updates: int, **settings
) -> None:
    results = [
        train(
            num_updates,
            loss=loss,
            num_updates=num_updates,
            micro_batch_size=size,
            reference=str(other_folder),
            **settings,
        )[1]
        for size in (1, 7, 1000)
    ]
    rollout = results[0].batches[0].rollout
    assert rollout is not None
    assert (plain_advantages(rollout.rewards.sum(dim=1)) != 0).all()
    gradients, weights = plain_training(oracle, tiny_folder, rollout, loss, num_updates, other_folder)
    for recorder in results:
        assert len(recorder.gradients) == num_updates
        for update in range(num_updates):
            assert_same_gradients(recorder.gradients[update], gradients[update])
            for name, value in weights[update].items():
                torch.testing.assert_close(
                    recorder.weights[update][name],
                    value,
                    rtol=0,
                    atol=1e-6,
                    msg=f"{name} after update {update}",
                )
    moved = max(
        float((weights[-1][n] - p).abs().max()) for n, p in snapshot(load_policy(tiny_folder)).items()
    )
    assert moved > LR / 2


def test_one_micro_batch_is_scored_once_and_several_twice_where_the_denominator_needs_it(train):
    # 3 prompts x 4 completions x 2 timesteps = 24 noisy states, fewer where a row is all padding.
    _, whole = train(loss=LossConfig(tau=0.6))
    _, parts = train(loss=LossConfig(tau=0.6), micro_batch_size=10)
    _, no_clip = train(loss=LossConfig(tau=0.0), micro_batch_size=10)
    assert whole.num_states == [24]
    # Three micro-batches of equal size: once for the count, once for the gradient.
    assert parts.num_states == [8, 8, 8] * 2
    assert no_clip.num_states == [8, 8, 8]


class FlatFor(PerSampleReward):
    """The same reward for every completion of some prompts, a different one for each of the others."""

    def __init__(self, flat: set[str]) -> None:
        self.flat = flat

    def score(self, completion, problem):
        if problem.prompt in self.flat:
            return 0.5
        return sum(place * ord(letter) for place, letter in enumerate(completion, start=1)) % 97 / 97


def prompts_of_first_step(task) -> list[str]:
    return [task.row("train", place)["puzzle"] for place in range(3)]


def test_rows_without_advantage_cost_nothing_without_kl(train, spread_task):
    reward = FlatFor({prompts_of_first_step(spread_task)[1]})
    _, without_kl = train(reward=reward, loss=LossConfig(tau=0.0))
    _, with_kl = train(reward=reward, loss=LossConfig(tau=0.0, beta=0.1))
    assert set().union(*without_kl.rows) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert sum(without_kl.num_states) == 16
    # The policy and the reference.
    assert set().union(*with_kl.rows) == set(range(12))
    assert sum(with_kl.num_states) == 48


def test_groups_without_spread_leave_the_weights_alone(train, tiny_folder, spread_task):
    reward = FlatFor(set(prompts_of_first_step(spread_task)))
    module, recorder = train(reward=reward, optimizer=OptimizerConfig(lr=0.1, weight_decay=0.5))
    assert recorder.num_states == []
    assert module.trainer.global_step == 1
    before = load_policy(tiny_folder).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in module.policy.state_dict().items())


def test_train_groups_picks_the_groups_whose_rewards_differ(train, spread_task):
    reward = FlatFor(set(prompts_of_first_step(spread_task)[:2]))
    module, recorder = train(reward=reward, train_groups=1, loss=LossConfig(beta=0.1))
    rollout = recorder.batches[0].rollout
    assert torch.equal(module.learned.completion_ids, rollout.completion_ids[8:])
    assert module.learned.trained.tolist() == [True] * 4
    # One group of 4 rows, two timesteps each; the policy and the reference.
    assert recorder.num_states == [8, 8]
    expected = plain_advantages(rollout.rewards[8:].sum(dim=1))
    torch.testing.assert_close(module.learned.advantages, expected)
    assert module.trainer.callback_metrics["reward/spread"] == pytest.approx(1 / 3)
    assert module.trainer.callback_metrics["update/spread"] == 1.0


def test_train_groups_without_kl_leaves_out_what_has_no_advantage(train, spread_task):
    reward = FlatFor({prompts_of_first_step(spread_task)[0]})
    module, recorder = train(reward=reward, train_groups=3)
    assert module.learned.trained.all()
    assert recorder.rows == [set(range(4, 12))]


def test_bfloat16_weights_keep_what_is_counted_in_float32(train):
    module, recorder = train(dtype="bfloat16", loss=LossConfig(beta=0.1), micro_batch_size=7)
    assert module.policy.dtype == torch.bfloat16
    rollout = recorder.batches[0].rollout
    assert rollout.token_probs.dtype == module.learned.advantages.dtype == torch.float32
    assert module.trained_probs.dtype == module.trainer.callback_metrics["loss/total"].dtype == torch.float32
    assert any(value.abs().max() > 0 for value in recorder.gradients[0].values())


@pytest.mark.parametrize(
    ("precision", "fix"),
    [
        ("16-mixed", "use bf16-mixed or 32-true"),
        ("16-true", "use bf16-mixed or 32-true"),
        ("bf16-true", "set model.dtype to bfloat16"),
    ],
)
def test_half_precision_is_refused(train, precision: str, fix: str, monkeypatch):
    # On a CPU Lightning turns 16-mixed into bf16-mixed.
    monkeypatch.setattr(Trainer, "precision", precision)
    with pytest.raises(ConfigError, match=rf"trainer.precision is '{precision}'.*{fix}"):
        train()


@pytest.fixture
def count_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    rollout_groups = drift.callbacks.rollout.rollout_groups

    def counted(policy, batch, *args, **settings):
        calls.append(batch.update)
        return rollout_groups(policy, batch, *args, **settings)

    monkeypatch.setattr(drift.callbacks.rollout, "rollout_groups", counted)
    return calls


def test_one_rollout_serves_all_its_updates(train, count_rollouts):
    module, recorder = train(5, num_updates=3)
    assert count_rollouts == [0, 0]
    assert module.trainer.global_step == 5
    assert [batch.update for batch in recorder.batches] == [0, 1, 2, 0, 1]
    assert [batch.positions.tolist() for batch in recorder.batches] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 2
    assert [batch.rollout is None for batch in recorder.batches] == [False, True, True, False, True]


def test_every_update_draws_its_own_plan_and_compares_with_the_weights_of_the_rollout(
    train, tiny_folder, monkeypatch
):
    seen = []
    rldf_loss = drift.module.rldf_loss

    def record(policy, states, config, **settings):
        output = rldf_loss(policy, states, config, **settings)
        seen.append(
            (states, settings["old"].logp.clone(), policy.logp.detach().clone(), output.parts["ratio"])
        )
        return output

    monkeypatch.setattr(drift.module, "rldf_loss", record)
    module, recorder = train(
        2,
        num_updates=2,
        loss=LossConfig(tau=0.0),
        optimizer=OptimizerConfig(lr=1e-3),
        sampler=WeightedSampler(k=1),
    )
    (first, old_first, now_first, ratio_first), (second, old_second, now_second, ratio_second) = seen
    assert torch.equal(old_first, now_first)
    torch.testing.assert_close(ratio_first, torch.tensor(1.0))
    assert not torch.equal(first.scored, second.scored), "the second update must draw a plan of its own"
    before = load_policy(tiny_folder)
    with torch.no_grad():
        logits = before.logits(second.input_ids, second.attention_mask)[:, -16:]
    logits[..., before.mask_token_id] = -torch.inf
    expected = logits.log_softmax(dim=-1).gather(-1, second.targets[..., None])[..., 0]
    torch.testing.assert_close(old_second[second.scored], expected[second.scored], rtol=0, atol=1e-5)
    assert (now_second - old_second).abs().max() > 1e-3
    assert abs(float(ratio_second) - 1) > 1e-4
    # Looking back with the old weights leaves the new ones in place.
    assert all(torch.equal(recorder.weights[1][n], p) for n, p in module.policy.named_parameters())


def test_looking_back_puts_the_weights_back_even_on_an_error(train):
    looks, steps, left = [], [], []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            self.policy = pl_module.policy

        def on_train_batch_end(self, trainer, pl_module, *args):
            steps.append(snapshot(pl_module.policy))

        def on_exception(self, trainer, pl_module, exception):
            left.append(snapshot(pl_module.policy))

    watch = Watch()

    def fail_at_second_look_back():
        if torch.is_grad_enabled():
            return
        looks.append(snapshot(watch.policy))
        if len(looks) == 2:
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        train(2, callbacks=(watch,), num_updates=2, on_score=fail_at_second_look_back)
    assert all(torch.equal(looks[0][n], looks[1][n]) for n in looks[0]), (
        "both with the weights of the rollout"
    )
    assert any(not torch.equal(left[0][n], looks[0][n]) for n in looks[0])
    assert all(torch.equal(left[0][n], steps[0][n]) for n in looks[0])


@pytest.mark.parametrize("micro_batch_size", [5, 1000])
def test_feedback_refreshes_exactly_the_tokens_that_were_scored_at_their_own_timestep(
    train, tiny_folder, micro_batch_size: int
):
    probs = []

    class Probs(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            probs.append(pl_module.learned.token_probs.clone())

    _, recorder = train(
        2,
        callbacks=(FeedbackCallback(), Probs()),
        num_updates=3,
        sampler=WeightedSampler(k=1),
        optimizer=OptimizerConfig(lr=1e-2),
        micro_batch_size=micro_batch_size,
    )
    rollout = recorder.batches[0].rollout
    before = rollout.token_probs
    for update, weights in enumerate([snapshot(load_policy(tiny_folder)), recorder.weights[0]]):
        keyed = replace(rollout, token_probs=before, seeds=fold(rollout.seeds, -1, update))
        plan = WeightedSampler(k=1).plan(keyed)
        policy = load_policy(tiny_folder)
        policy.load_state_dict(weights)
        with torch.no_grad():
            fresh = plain_logprobs(policy, rollout, plan.masked).exp()[0]
        scored = plan.current[0] & rollout.completion_mask
        assert scored.any(dim=1).all()
        assert not scored.all()
        torch.testing.assert_close(probs[update][scored], fresh[scored], rtol=1e-4, atol=1e-6)
        assert torch.equal(probs[update][~scored], before[~scored])
        if update == 1:
            assert (probs[update] - before).abs().max() > 1e-3
        before = probs[update]


class Mismatches(Callback):
    """Keeps the figures of the mismatch of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = trainer.callback_metrics
        self.steps.append({k: float(v) for k, v in metrics.items() if k.startswith("mismatch/")})


@pytest.mark.parametrize("num_updates", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_cached_rollouts_have_a_mismatch_and_steps_do_not_add_to_it(
    train, temperature: float, num_updates: int
):
    found = {}
    for name, decode in (("plain", DECODE), ("cached", CACHED)):
        watch = Mismatches()
        # Greedy groups have no spread: the KL makes their tokens count. The steps are large.
        train(
            3,
            callbacks=(watch,),
            decode=replace(decode, temperature=temperature),
            loss=LossConfig(tau=0.0, beta=0.1),
            num_updates=num_updates,
            optimizer=OptimizerConfig(lr=1e-3),
            micro_batch_size=7,
        )
        found[name] = watch.steps
        assert all(step.keys() == {"mismatch/kl", "mismatch/max_ratio"} for step in watch.steps)
    assert len(found["plain"]) == len(found["cached"]) == 3
    for plain, cached in zip(found["plain"], found["cached"], strict=True):
        assert 0 <= plain["mismatch/kl"] < 1e-5
        assert 1 <= plain["mismatch/max_ratio"] < 1 + 1e-3
        assert cached["mismatch/kl"] > 1e-3
        assert cached["mismatch/max_ratio"] > 1.1


def test_the_mismatch_costs_no_pass_and_does_not_depend_on_micro_batches(train):
    found = []
    for size in (5, 1000):
        watch = Mismatches()
        loss = LossConfig(tau=0.0, importance_cap=1.5)
        _, recorder = train(callbacks=(watch,), decode=CACHED, loss=loss, micro_batch_size=size)
        assert sum(recorder.num_states) == 24
        found.append(watch.steps[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0].keys() == {f"mismatch/{name}" for name in ("kl", "max_ratio", "weight", "capped_share")}
    assert 0 < found[0]["mismatch/weight"] < 1.5
    assert 0 < found[0]["mismatch/capped_share"] < 1


@pytest.mark.parametrize("normalisation", ["token", "sample", "trajectory"])
def test_figures_of_tokens_are_means_whatever_the_loss_is_divided_by(train, normalisation: str):
    loss = LossConfig(tau=None, normalisation=normalisation)
    module, _ = train(sampler=FullSampler(), loss=loss, num_updates=2, micro_batch_size=7)
    # Before the first step every token's ratio is 1, and so is their mean.
    assert float(module.trainer.callback_metrics["loss/ratio"]) == pytest.approx(1.0, rel=1e-5)


def test_noisy_states_that_the_policy_never_saw_have_no_mismatch_and_no_weights(train):
    watch = Mismatches()
    train(callbacks=(watch,), sampler=RandomMaskSampler(k=1))
    assert watch.steps == [{}]
    with pytest.raises(ConfigError, match=r"importance_cap is 2\.0: .*take a sampler of its own timesteps"):
        train(sampler=RandomMaskSampler(k=1), loss=LossConfig(importance_cap=2.0))


@pytest.mark.parametrize("decode", [DECODE, DRAWN], ids=["threshold", "drawn"])
def test_the_probabilities_of_the_rollout_outlive_refreshes_and_checkpoints(train, tmp_path: Path, decode):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            trainer.save_checkpoint(tmp_path / "between.ckpt")

    optimizer = OptimizerConfig(lr=1e-2)
    callbacks = (FeedbackCallback(), Save())
    _, recorder = train(2, callbacks=callbacks, num_updates=3, optimizer=optimizer, decode=decode)
    (saved,) = torch.load(tmp_path / "between.ckpt", weights_only=True)["rollout_at_hand"]["ranks"]
    assert torch.equal(saved["commit_probs"], recorder.batches[0].rollout.token_probs)
    assert (saved["token_probs"] - saved["commit_probs"]).abs().max() > 1e-3
    rollout = recorder.batches[0].rollout
    for name in ("commit_kind", "commit_rule"):
        assert (saved[name] is None) == (decode is DECODE)
        assert saved[name] is None or torch.equal(saved[name], getattr(rollout, name))
    assert saved["block_length"] == decode.block_length


def test_the_rollout_at_hand_follows_the_policy_to_its_device(train, monkeypatch):
    def devices() -> set[str]:
        tensors = [getattr(module.learned, field.name) for field in fields(module.learned)]
        return {value.device.type for value in tensors if isinstance(value, Tensor)}

    monkeypatch.setattr("drift.policy_module.PolicyModule.on_load_checkpoint", lambda *_: None)
    module, _ = train(num_updates=2)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert devices() == {"cpu"}
    module.to("meta")
    module.on_fit_start()
    assert devices() == {"meta"}
    # Where ranks share the weights, a checkpoint is read after that.
    module.on_load_checkpoint(checkpoint)
    assert devices() == {"meta"}


def test_the_rollout_at_hand_leaves_its_device_before_ranks_exchange_it(train, monkeypatch):
    module, _ = train(num_updates=2)
    moved = []
    monkeypatch.setattr("drift.module.move_data_to_device", lambda *what: moved.append(what) or what[0])
    module.on_save_checkpoint({})
    ((rollout, device),) = moved
    assert rollout is module.learned
    assert device.type == "cpu"


def test_a_refresh_replaces_the_tensor_that_a_rollout_holds_twice(tiny_folder: Path):
    module, probs = RLDFModule(str(tiny_folder)), torch.tensor([[0.5, 0.25]])
    blank = torch.zeros(1, 2, dtype=torch.int64)
    module.learned = Rollout(
        prompt_ids=blank,
        prompt_mask=blank.bool(),
        completion_ids=blank,
        completion_mask=blank.bool(),
        step_map=blank,
        token_probs=probs,
        commit_probs=probs,
    )
    module.trained_probs = torch.tensor([[0.0, 0.75]])
    module.refresh_feedback()
    assert module.learned.token_probs.tolist() == [[0.5, 0.75]]
    assert module.learned.commit_probs.tolist() == [[0.5, 0.25]]


def test_reference_is_frozen_and_belongs_to_nobody(train, tiny_folder):
    module, _ = train(2, loss=LossConfig(beta=0.1), optimizer=OptimizerConfig(lr=1e-2))
    reference = module.reference
    assert not reference.training
    assert module.policy.training
    assert not any(p.requires_grad for p in reference.parameters())
    before = load_policy(tiny_folder).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in module.policy.state_dict().items())
    mine = {id(p) for p in reference.parameters()}
    assert not mine & {id(p) for p in module.parameters()}
    groups = module.trainer.optimizers[0].param_groups
    assert not mine & {id(p) for group in groups for p in group["params"]}
    assert all(name.startswith("policy.") for name in module.state_dict())
    assert len([key for key in module.state_dict() if key.startswith("policy.")]) == len(before)
    module.train()
    assert not reference.training


def test_no_reference_is_loaded_without_kl(train):
    module, _ = train(loss=LossConfig(beta=0.0))
    assert module.reference is None


def test_rollouts_see_the_policy_in_evaluation_mode_and_updates_in_training_mode(train, monkeypatch):
    modes = []
    rollout_groups, score = drift.callbacks.rollout.rollout_groups, RLDFModule._score

    def rolled(policy, *args, **settings):
        modes.append(("rollout", policy.training, torch.is_grad_enabled()))
        return rollout_groups(policy, *args, **settings)

    def scored(module, policy, states):
        modes.append(("update", policy.training, torch.is_grad_enabled()))
        return score(module, policy, states)

    monkeypatch.setattr(drift.callbacks.rollout, "rollout_groups", rolled)
    monkeypatch.setattr(RLDFModule, "_score", scored)
    train()
    assert modes == [("rollout", False, False), ("update", True, True)]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_before_they_reach_the_weights(
    train, monkeypatch, tmp_path: Path, where: str
):
    rldf_loss, steps = drift.module.rldf_loss, []

    def broken(*args, **settings):
        output = rldf_loss(*args, **settings)
        steps.append(output)
        if len(steps) < 2:
            return output
        if where == "loss":
            return replace(output, loss=output.loss * torch.nan)
        # sqrt has an infinite slope at 0: the loss is finite, its gradient is not.
        return replace(output, loss=output.loss + (output.loss - output.loss.detach()).clamp(min=0).sqrt())

    monkeypatch.setattr(drift.module, "rldf_loss", broken)
    kept = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            kept.append((snapshot(pl_module.policy), deepcopy(trainer.optimizers[0].state_dict())))

    with pytest.raises(SampleError, match=r"is nan at step 1: the weights are as before") as caught:
        train(3, callbacks=(RescueCallback(), Keep()))
    assert len(kept) == 1
    checkpoint = torch.load(tmp_path / "rescue.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    for name, value in kept[0][0].items():
        assert torch.equal(checkpoint["state_dict"][f"policy.{name}"], value), name
    for number, state in kept[0][1]["state"].items():
        saved = checkpoint["optimizer_states"][0]["state"][number]
        assert all(torch.equal(saved[key], state[key]) for key in state)
    written = json.loads((tmp_path / "rescue.json").read_text())
    assert written["step"] == 1
    assert written["positions"] == [3, 4, 5]
    assert len(written["prompts"]) == 3
    assert written["message"] == str(caught.value)
    assert "model.optimizer.lr" in written["message"]
    assert all(len(ids) == 16 for ids in written["completion_ids"])
    assert len(written["completion_ids"]) == len(written["advantages"]) == 12


def test_chosen_groups_are_rescued_with_their_own_prompts(train, spread_task, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(drift.module, "finite_on_all_ranks", lambda value: False)
    with pytest.raises(SampleError):
        train(train_groups=2, callbacks=(RescueCallback(),))
    written = json.loads((tmp_path / "rescue.json").read_text())
    places, prompts = written["positions"], written["prompts"]
    assert len(places) == len(prompts) == len(written["completion_ids"]) == 8
    assert len(set(places)) == len(set(prompts)) == 2
    of_step = prompts_of_first_step(spread_task)
    assert prompts == [of_step[place] for place in places]


def test_norms_are_not_decayed(train, tiny_folder):
    decayed, _ = train(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.5))
    plain, _ = train(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0))
    before = snapshot(load_policy(tiny_folder))
    ones = dict(plain.policy.named_parameters())
    num_norms = 0
    for name, value in decayed.policy.named_parameters():
        if value.dim() == 1:
            num_norms += 1
            assert torch.equal(value, ones[name]), name
        else:
            # AdamW's decay: w -= lr * decay * w.
            expected = ones[name] - 1e-3 * 0.5 * before[name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)
    assert num_norms == 5


def test_schedule_is_stepped_once_a_step(train):
    module, _ = train(3, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=4))
    # 3 of 4 warm-up steps are done: the next one has 3/4 of the learning rate.
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(7.5e-4)


def test_full_sampler_visits_every_timestep(train):
    _, recorder = train(sampler=FullSampler(), micro_batch_size=1000)
    rollout = recorder.batches[0].rollout
    real = [
        {int(t) for t, good in zip(steps, valid, strict=True) if good}
        for steps, valid in zip(rollout.step_map, rollout.completion_mask, strict=True)
    ]
    assert sum(recorder.num_states) == sum(len(steps) for steps in real)


def test_logged_loss_and_counts(train):
    module, recorder = train(loss=LossConfig(tau=0.6, beta=0.2), micro_batch_size=5)
    logged = module.trainer.callback_metrics
    whole, _ = train(loss=LossConfig(tau=0.6, beta=0.2), micro_batch_size=1000)
    other = whole.trainer.callback_metrics
    assert logged["update/noisy_states"] == 24
    for name in ("loss/total", "loss/policy", "loss/kl", "loss/kept_share", "update/grad_norm"):
        torch.testing.assert_close(logged[name], other[name], rtol=1e-4, atol=1e-5, msg=name)
    assert 0 < logged["loss/kept_share"] < 1
    norm = torch.stack([g.square().sum() for g in recorder.gradients[0].values()]).sum().sqrt()
    torch.testing.assert_close(logged["update/grad_norm"], norm)
    assert "loss/ratio" not in logged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_updates": 0}, r"model\.num_updates is 0: set it to 1 or more"),
        ({"train_groups": -1}, r"model\.train_groups is -1: set it to 1 or more"),
        ({"micro_batch_size": 0}, r"model\.micro_batch_size is 0: set it to 1 or more"),
        ({"dtype": "float16"}, r"model\.dtype is 'float16': choose one of"),
        ({"policy": "nowhere"}, r"model\.policy is 'nowhere': there is no such folder"),
    ],
)
def test_settings_out_of_range(tiny_folder: Path, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        RLDFModule(**{"policy": str(tiny_folder)} | settings)


def test_train_groups_of_0_is_refused(tiny_folder: Path):
    with pytest.raises(ConfigError, match=r"model\.train_groups is 0"):
        RLDFModule(str(tiny_folder), train_groups=0)


def test_training_without_rollouts_says_which_callback_is_missing(tiny_folder, spread_task, make_trainer):
    with pytest.raises(ConfigError, match=r"RolloutCallback"):
        make_trainer().fit(RLDFModule(str(tiny_folder)), datamodule=PromptDataModule(spread_task))
