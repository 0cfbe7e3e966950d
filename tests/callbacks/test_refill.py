"""Further rounds of a step: how many, of which prompts, what is learned from them and what is logged."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer

import drift.callbacks.rollout
from drift.callbacks import CheckpointCallback, RolloutCallback
from drift.contract import ConfigError, SampleError
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig
from drift.signals import Stopped

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)
BESIDE = 2**40
NUM = 4  # prompts of a step


class SomeReward(PerSampleReward):
    """Differs for the completions of those prompts only that `useful` names, by the order they come in."""

    def __init__(self, useful: Callable[[int], bool]) -> None:
        self.useful = useful
        self.seen: list[str] = []

    def score(self, completion, problem):
        if problem.prompt not in self.seen:
            self.seen.append(problem.prompt)
        if not self.useful(self.seen.index(problem.prompt)):
            return 0.25
        return sum(place * ord(letter) for place, letter in enumerate(completion, start=1)) % 97 / 97


class Keep(Callback):
    def __init__(self) -> None:
        self.batches, self.learned, self.weights, self.figures = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.learned.append(pl_module.learned)
        self.weights.append({n: p.detach().clone() for n, p in pl_module.policy.named_parameters()})
        figures = trainer.callback_metrics
        self.figures.append({name: float(v) for name, v in figures.items() if "seconds" not in name})


@pytest.fixture
def train(tiny_folder: Path, spread_task, make_trainer: Callable[..., Trainer]):
    def run(steps=1, useful=None, rounds=3, train_groups=2, num_updates=1, callbacks=(), ckpt_path=None):
        keep = Keep()
        if useful is not None:
            spread_task.reward = SomeReward(useful)
        module = RLDFModule(
            str(tiny_folder),
            optimizer=OptimizerConfig(lr=1e-4),
            train_groups=train_groups,
            num_updates=num_updates,
        )
        rollout = RolloutCallback(
            group_size=3, completion_length=16, decode=DECODE, evaluation=DECODE, refill_rounds=rounds
        )
        trainer = make_trainer(
            steps, callbacks=[rollout, keep, *callbacks], enable_checkpointing=bool(callbacks)
        )
        trainer.fit(module, PromptDataModule(spread_task, prompts_per_step=NUM), ckpt_path=ckpt_path)
        return keep

    return run


def places(batch) -> list[list[int]]:
    return [(more.positions - BESIDE).tolist() for more in batch.refills]


@pytest.mark.parametrize(
    ("useful", "rounds", "expected", "learned"),
    [
        # Two of the first four: enough.
        ({1, 3}, 3, [], [1, 3]),
        # One of four, one is missing: four more. None is useful there: again 1 * 8 / 1, at most four.
        ({0, 9}, 3, [[0, 1, 2, 3], [4, 5, 6, 7]], [0, BESIDE + 5]),
        # What is found is enough after one round.
        ({0, 4, 6}, 3, [[0, 1, 2, 3]], [0, BESIDE]),
        # Never enough: the rounds are over, and one group of equal rewards fills the gap.
        ({5}, 1, [[0, 1, 2, 3]], [None, BESIDE + 1]),
        # Off: the filter alone.
        ({0, 4, 6}, 0, [], [0, None]),
    ],
)
def test_rounds_go_on_until_enough_groups_differ(train, useful, rounds, expected, learned):
    keep = train(useful=useful.__contains__, rounds=rounds)
    batch, rollout, figures = keep.batches[0], keep.learned[0], keep.figures[0]
    assert places(batch) == expected
    assert batch.positions.tolist() == [0, 1, 2, 3]
    found = rollout.positions[::3].tolist()
    assert [place for place in found if place in learned] == [place for place in learned if place is not None]
    assert len(found) == 2
    assert rollout.trained.all()
    # What is logged of rewards is of the first round.
    assert figures["reward/mean"] == pytest.approx(float(batch.rollout.rewards.mean()))
    num_first = len(useful & set(range(NUM)))
    assert figures["reward/spread"] == num_first / NUM
    assert figures["update/spread"] == sum(place is not None for place in learned) / 2
    if rounds:
        assert figures["rollout/rounds"] == 1 + len(expected)
        assert figures["rollout/prompts"] == NUM + sum(map(len, expected))
    else:
        assert "rollout/rounds" not in figures


def test_a_round_is_no_larger_than_what_is_missing_makes_likely(train):
    # Three of four are useful, one is missing: 1 * 4 / 3, that is two prompts; then 1 * 6 / 3.
    keep = train(useful={0, 1, 2, 6}.__contains__, train_groups=4)
    assert places(keep.batches[0]) == [[0, 1], [2, 3]]
    assert sorted(keep.learned[0].positions.unique().tolist()) == [0, 1, 2, BESIDE + 2]


def test_rows_of_further_rounds_are_learned_from_whole(train):
    keep = train(useful={0, 6}.__contains__)
    batch, rollout = keep.batches[0], keep.learned[0]
    for place, source in ((0, batch), (BESIDE + 2, batch.refills[0])):
        rows = (rollout.positions == place).nonzero()[:, 0]
        theirs = (source.positions == place).repeat_interleave(3)
        for name in ("completion_ids", "step_map", "token_probs", "rewards", "seeds", "num_timesteps"):
            assert torch.equal(getattr(rollout, name)[rows], getattr(source.rollout, name)[theirs]), name
    assert (rollout.advantages != 0).all()


def test_the_stream_and_the_first_round_do_not_depend_on_further_rounds(train):
    with_rounds, without = (train(3, useful=lambda n: n % 5 == 0, rounds=rounds) for rounds in (2, 0))
    positions = [[batch.positions.tolist() for batch in keep.batches] for keep in (with_rounds, without)]
    assert positions[0] == positions[1] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    first = [keep.batches[0].rollout.completion_ids for keep in (with_rounds, without)]
    assert torch.equal(*first)
    # Every step has places of its own: 2 rounds of 4 prompts at most.
    steps = [[place for found in places(batch) for place in found] for batch in with_rounds.batches]
    assert all(set(found) <= set(range(8 * i, 8 * i + 8)) for i, found in enumerate(steps))
    assert all(found[0] == 8 * i for i, found in enumerate(steps))
    prompts = [p.prompt for batch in with_rounds.batches for b in (batch, *batch.refills) for p in b.problems]
    assert len(set(prompts)) == len(prompts)


@pytest.fixture
def num_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = drift.callbacks.rollout.rollout_groups

    def counted(policy, batch, *args, **settings):
        calls.append(len(batch.problems))
        return real(policy, batch, *args, **settings)

    monkeypatch.setattr(drift.callbacks.rollout, "rollout_groups", counted)
    return calls


class ByPromptReward(PerSampleReward):
    """Differs for the completions of some prompts, always of the same ones."""

    def score(self, completion, problem):
        if sum(map(ord, problem.prompt)) % 2:
            return 0.25
        return sum(place * ord(letter) for place, letter in enumerate(completion, start=1)) % 97 / 97


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("how", ["error", "signal"])
def test_a_step_that_is_broken_off_in_a_further_round_is_made_again(
    train, spread_task, num_rollouts, tmp_path: Path, how: str, num_updates: int
):
    spread_task.reward = ByPromptReward()
    settings = {"rounds": 2, "num_updates": num_updates, "train_groups": 3}
    whole = train(6, **settings)
    rounds = [1 + len(batch.refills) for batch in whole.batches if batch.rollout is not None]
    assert sum(num > 1 for num in rounds) >= 2
    # The last further round of all, by how many came before.
    number = sum(rounds[: max(i for i, num in enumerate(rounds) if num > 1) + 1]) - 1
    del num_rollouts[:]
    checkpoint = CheckpointCallback(every=1, dirpath=str(tmp_path / "kept"))

    class Broken(ByPromptReward):
        def score(self, completion, problem):
            if len(num_rollouts) == number + 1:
                if how == "error":
                    raise SystemError("no luck")
                checkpoint._watch.pending = signal.SIGTERM
            return super().score(completion, problem)

    spread_task.reward = Broken()
    with pytest.raises((SampleError, Stopped)) as caught:
        train(6, callbacks=[checkpoint], **settings)
    assert isinstance(caught.value, Stopped) == (how == "signal")
    last = tmp_path / "kept" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 6
    spread_task.reward = ByPromptReward()
    rest = train(6, ckpt_path=str(last), **settings)
    assert len(rest.weights) == 6 - step
    assert rest.figures == whole.figures[step:]
    for ours, theirs in zip(rest.weights, whole.weights[step:], strict=True):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_between_two_updates_the_figures_of_the_rollout_go_on(train, spread_task, tmp_path: Path):
    spread_task.reward = ByPromptReward()
    whole = train(4, num_updates=4, train_groups=4)
    checkpoint = CheckpointCallback(every=1, dirpath=str(tmp_path / "kept"))
    train(2, num_updates=4, train_groups=4, callbacks=[checkpoint])
    rest = train(4, num_updates=4, train_groups=4, ckpt_path=str(tmp_path / "kept" / "last.ckpt"))
    assert rest.figures == whole.figures[2:]
    assert rest.figures[0]["rollout/prompts"] > NUM
    assert rest.figures[0]["reward/mean"] == whole.figures[0]["reward/mean"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": -1}, r"rollout\.refill_rounds is -1: set it to 0 for no further rounds, or more"),
        ({"train_groups": None}, r"rollout\.refill_rounds is 3: how many groups .*model\.train_groups"),
    ],
)
def test_settings_that_cannot_work_are_refused(train, settings, message: str):
    with pytest.raises(ConfigError, match=message):
        train(**settings)
