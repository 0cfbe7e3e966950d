import json
from pathlib import Path

import pytest
import torch

import drift.evaluation
from drift.callbacks import AnswerCallback, RolloutCallback, SummaryCallback
from drift.contract import ConfigError, PromptBatch, Rollout
from drift.data import Benchmark, PromptDataModule
from drift.evaluation import (
    FIGURES,
    Answer,
    Cell,
    CellResult,
    GridConfig,
    Tally,
    answers_of,
    logged,
    looked_at,
)
from drift.metrics import wilson_interval
from drift.module import RLDFModule
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig
from drift.tasks import CountdownTask, SudokuTask

GREEDY = DenoiseConfig(block_length=16)
WARM = DenoiseConfig(block_length=8, temperature=1.0)


def test_without_a_grid_there_is_one_cell():
    (cell,) = GridConfig().cells(32, GREEDY, 5)
    assert (cell.name, cell.length, cell.decode, cell.samples, cell.seed) == ("evaluation", 32, GREEDY, 1, 5)


def test_the_grid_is_every_length_with_every_decode():
    grid = GridConfig(
        lengths=[32, 16], decodes={"a": WARM, "b": DenoiseConfig(block_length=4, score="random")}
    )
    cells = grid.cells(8, GREEDY, 0)
    assert [(cell.length, cell.name) for cell in cells] == [(32, "a"), (32, "b"), (16, "a"), (16, "b")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, r"rollout\.test\.samples is 0: set it to 1 or more"),
        ({"lengths": []}, r"rollout\.test\.lengths is \[\]: give at least one, or null"),
        ({"decodes": {}}, r"rollout\.test\.decodes is \{\}: give at least one, or null"),
        ({"lengths": [16, 16]}, r"rollout\.test\.lengths is \[16, 16\]: name each length once"),
        (
            {"lengths": [16, 20], "decodes": {"warm": WARM}},
            r"rollout\.test, length 20, decode 'warm': completion_length is 20, block_length is 8: .*mult",
        ),
        ({"lengths": [0]}, r"rollout\.test, length 0, decode 'evaluation': completion_length is 0"),
        (
            {"decodes": {"slow": DenoiseConfig(block_length=8, threshold=None, steps=1)}},
            r"decode 'slow': steps is 1: 2 blocks .* need at least 2",
        ),
        (
            {"samples": 4, "decodes": {"warm": WARM, "cold": GREEDY}},
            r"rollout\.test\.samples is 4: decode 'cold' has temperature 0, .*pass@k says nothing; set",
        ),
    ],
)
def test_grids_that_cannot_work_are_refused_when_they_are_made(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        RolloutCallback(completion_length=16, decode=WARM, evaluation=GREEDY, test=GridConfig(**settings))


def test_several_samples_of_random_order_are_no_mistake():
    decode = DenoiseConfig(block_length=16, score="random")
    assert GridConfig(samples=2, decodes={"random": decode}).cells(16, GREEDY, 0)


def test_the_seed_is_a_setting_where_something_is_drawn():
    def settings(decode: DenoiseConfig) -> dict:
        return Cell(name="x", length=16, decode=decode, seed=3).settings()

    assert settings(GREEDY)["seed"] is None
    assert settings(WARM)["seed"] == 3
    assert settings(WARM)["decode"]["block_length"] == 8


def judged(correct: list[bool], rewards: list[float], timesteps: list[int], num_valid: list[int]) -> Rollout:
    ids = torch.zeros(len(correct), 8, dtype=torch.int64)
    return Rollout(
        prompt_ids=ids,
        prompt_mask=ids.bool(),
        completion_ids=ids,
        completion_mask=torch.arange(8) < torch.tensor(num_valid)[:, None],
        step_map=ids,
        num_timesteps=torch.tensor(timesteps),
        scores=torch.tensor([[reward, 1.0] for reward in rewards]),
        reward_names=("math", "format"),
        rewards=torch.tensor(rewards)[:, None],
        correct=torch.tensor(correct),
        finished=torch.tensor(num_valid) < 8,
        seconds=1.5,
    )


def batch(positions: list[int], *grid: Rollout) -> PromptBatch:
    ids = torch.zeros(len(positions), 2, dtype=torch.int64)
    problems = [None] * len(positions)
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=ids.bool(),
        problems=problems,
        positions=torch.tensor(positions),
        rollout=grid[0],
        grid=list(grid),
    )


FIRST = judged([True, False, True, True], [1.0, 0.25, 1.0, 1.0], [4, 2, 3, 3], [8, 4, 8, 2])


def test_answers_are_numbered_by_prompt_and_sample():
    found = list(answers_of(batch([7, 4], FIRST), FIRST))
    assert [(a.position, a.sample, a.correct) for a in found] == [
        (7, 0, True),
        (7, 1, False),
        (4, 0, True),
        (4, 1, True),
    ]
    assert found[1] == Answer(
        7, 1, correct=False, finished=True, reward=0.25, timesteps=2, tokens=4, scores=(0.25, 1.0)
    )


def test_figures_of_a_cell():
    tally = Tally()
    tally.add(0, batch([7, 4], FIRST))
    tally.add(0, batch([1], judged([False, False], [0.0, 0.5], [8, 8], [8, 8])))
    (result,) = tally.close().values()
    assert result.positions == [1, 4, 7]
    assert result.num_correct == [0, 2, 1]
    found = result.figures()
    # Accuracies 0, 1, 0.5: variance 1/6 against 0.25 / 2: design effect 4/3, 6 / (4/3) = 4.5 answers.
    low, high = wilson_interval(2.25, 4.5)
    assert found == pytest.approx(
        {
            "num": 3,
            "accuracy": 0.5,
            "accuracy_low": low,
            "accuracy_high": high,
            "reward": (1 + 0.25 + 1 + 1 + 0 + 0.5) / 6,
            "timesteps": 28 / 6,
            "tokens_per_forward": (8 + 4 + 8 + 2 + 8 + 8) / 28,
            "unfinished": 4 / 6,
            "seconds": 3.0,
            "reward/math": (1 + 0.25 + 1 + 1 + 0 + 0.5) / 6,
            "reward/format": 1.0,
            "pass@1": 0.5,
            "pass@2": 2 / 3,
        }
    )
    assert tally.close() == {}


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, []), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_which_k_are_looked_at(samples: int, ks: list[int]):
    assert looked_at(samples) == ks


def test_ranks_come_together_in_the_order_of_prompts(monkeypatch: pytest.MonkeyPatch):
    """One of them has seen nothing of the second set."""
    ranks = [Tally(), Tally()]
    ranks[0].add(0, batch([0, 2], judged([True, False], [1.0, 0.0], [1, 2], [1, 1])))
    ranks[1].add(0, batch([1], judged([True], [0.5], [3], [1])))
    ranks[1].add(0, batch([3], judged([True], [0.5], [4], [1])))
    ranks[0].add(1, batch([0], judged([True], [1.0], [5], [1])))
    gathered = [(rank.answers, rank.seconds, rank.parts) for rank in ranks]
    monkeypatch.setattr(drift.evaluation, "gather_over_ranks", lambda _: gathered)
    for rank in ranks:
        found = rank.close()
        assert [answer.timesteps for answer in found[0, 0].answers] == [1, 3, 2, 4]
        assert found[0, 0].seconds == 3.0
        assert [answer.timesteps for answer in found[1, 0].answers] == [5]


def test_names_in_the_log_are_plain_where_there_is_one_cell():
    answers = [Answer(0, 0, correct=True, finished=True, reward=1.0, timesteps=2, tokens=4)]
    result = CellResult(answers=answers, seconds=1.0)
    cells = [Cell(name="fast", length=16, decode=GREEDY), Cell(name="slow", length=32, decode=GREEDY)]
    assert logged({(0, 0): result}, ["math"], cells[:1])["accuracy"] == 1.0
    several = logged({(0, 0): result, (0, 1): result}, ["math"], cells)
    assert several["math/32/slow/timesteps"] == 2.0
    assert len(several) == 2 * len(result.figures())
    # What may be monitored is what every validation has.
    assert tuple(result.figures()) == FIGURES
    assert "code/16/fast/accuracy" in logged({(1, 0): result}, ["math", "code"], cells[:1])


class Coarse(PerSampleReward):
    """Right by chance, one time in three, and then more or less wrong."""

    def score(self, completion, problem):
        return (1.0, 0.1, 0.3)[sum(map(ord, completion)) % 3]


@pytest.fixture
def evaluate(tiny_folder: Path, make_trainer, tmp_path: Path):
    """Runs a test of two sets, two lengths and two decode settings; gives back its two files."""

    tasks = SudokuTask(), CountdownTask()
    for task in tasks:
        task.reward = Coarse()
    fast = DenoiseConfig(block_length=8, temperature=1.0, threshold=0.2)

    def run(name: str, evaluation_batch_size: int, batch_size: int | None = None, samples: int = 3):
        grid = GridConfig(
            lengths=[8, 16],
            decodes={
                "fast": fast,
                "slow": DenoiseConfig(block_length=8, temperature=0.5, threshold=None, steps=8),
            },
            samples=samples,
        )
        rollout = RolloutCallback(
            completion_length=16, decode=WARM, evaluation=GREEDY, batch_size=batch_size, test=grid
        )
        sets = {"sudoku": Benchmark(limit=5), "countdown": Benchmark(task=tasks[1], limit=4)}
        data = PromptDataModule(tasks[0], test=sets, evaluation_batch_size=evaluation_batch_size)
        files = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        callbacks = [rollout, SummaryCallback(str(files[0])), AnswerCallback(str(files[1]))]
        trainer = make_trainer(callbacks=callbacks)
        trainer.test(RLDFModule(str(tiny_folder)), datamodule=data, verbose=False)
        return [file.read_text() for file in files]

    return run


def without_seconds(text: str) -> str:
    found = json.loads(text)
    assert all(result.pop("seconds") > 0 for result in found["results"])
    return json.dumps(found)


def test_results_do_not_depend_on_the_batch_size(evaluate):
    """Ragged last batches, whole sets in one batch, and rows of one prompt in different passes."""
    results, answers = evaluate("one", 1)
    found = json.loads(results)["results"]
    assert len(found) == 8
    assert [result["num"] for result in found] == [5] * 4 + [4] * 4
    # Something is drawn, and it matters.
    assert (
        len({json.dumps([result["num_correct"], result["timesteps"], result["reward"]]) for result in found})
        == 8
    )
    assert all(0 < result["accuracy"] < result["pass@3"] for result in found)
    for name, *sizes in (("three", 3), ("sixty-four", 64), ("pieces", 3, 2)):
        other_results, other_answers = evaluate(name, *sizes)
        assert without_seconds(other_results) == without_seconds(results), name
        assert other_answers == answers, name


def test_more_samples_begin_with_the_fewer(evaluate):
    few, many = (
        {
            (line["dataset"], line["position"], line["length"], line["decode"], line["sample"]): line[
                "answer"
            ]
            for line in map(json.loads, evaluate(str(samples), 64, samples=samples)[1].splitlines())
        }
        for samples in (1, 3)
    )
    assert len(many) == 3 * len(few)
    assert few == {key: many[key] for key in few}


def test_validation_in_training_measures_what_a_test_does(tiny_folder, spread_task, make_trainer):
    rollout = RolloutCallback(group_size=2, completion_length=16, decode=WARM, evaluation=GREEDY)
    data = PromptDataModule(spread_task, prompts_per_step=2, num_validation=3, num_test=3)
    trainer = make_trainer(1, callbacks=[rollout], limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(RLDFModule(str(tiny_folder)), datamodule=data)
    validated = {name[4:] for name in trainer.callback_metrics if name.startswith("val/")}
    trainer = make_trainer(callbacks=[rollout])
    (tested,) = trainer.test(RLDFModule(str(tiny_folder)), datamodule=data, verbose=False)
    assert {name[5:] for name in tested} == validated
    assert {"accuracy", "accuracy_low", "accuracy_high", "unfinished", "timesteps"} < validated


def test_each_set_is_judged_by_its_own_task(tiny_folder, spread_task, make_trainer, monkeypatch):
    judged_by = []
    own = CountdownTask()
    for task in (spread_task, own):
        monkeypatch.setattr(
            type(task.reward),
            "__call__",
            lambda self, texts, problems: judged_by.append((self, len(texts))) or torch.zeros(len(texts)),
        )
    sets = {"one": Benchmark(limit=2), "two": Benchmark(task=own, limit=3)}
    rollout = RolloutCallback(completion_length=16, decode=WARM, evaluation=GREEDY)
    trainer = make_trainer(callbacks=[rollout])
    data = PromptDataModule(spread_task, test=sets)
    trainer.test(RLDFModule(str(tiny_folder)), datamodule=data, verbose=False)
    assert judged_by == [(spread_task.reward, 2), (own.reward, 3)]
    # Predictions too.
    judged_by.clear()
    trainer.predict(RLDFModule(str(tiny_folder)), datamodule=data)
    assert judged_by == [(spread_task.reward, 2), (own.reward, 3)]


def test_prompts_that_leave_no_room_stop_before_the_weights_are_loaded(
    tiny_folder, spread_task, make_trainer, monkeypatch
):
    monkeypatch.setattr(
        "drift.policy_module.load_policy", lambda *_, **__: pytest.fail("weights were loaded")
    )
    # The policy reads 128 tokens, and sudoku prompts have 16.
    grid = GridConfig(lengths=[16, 120])
    rollout = RolloutCallback(
        completion_length=16, decode=WARM, evaluation=DenoiseConfig(block_length=8), test=grid
    )
    trainer = make_trainer(callbacks=[rollout])
    message = r"rollout\.test\.lengths is 120: with a prompt of 16 tokens .*max_sequence_length of 128"
    with pytest.raises(ConfigError, match=message):
        trainer.test(RLDFModule(str(tiny_folder)), datamodule=PromptDataModule(spread_task, num_test=2))
