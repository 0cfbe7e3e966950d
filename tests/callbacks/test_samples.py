import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from drift.callbacks import SampleTableCallback
from drift.contract import ConfigError, Problem, PromptBatch, Rollout
from drift.data import PromptTemplate
from drift.models.characters import character_tokenizer


class Bar(ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.text = []

    def print(self, *args, **settings):
        self.text.append(" ".join(args))


class Board(TensorBoardLogger):
    def __init__(self) -> None:
        self.texts = []

    @property
    def experiment(self):
        return SimpleNamespace(add_text=lambda *args: self.texts.append(args))


def batch(*completions: str, group_size: int = 2, prefix: str = "") -> PromptBatch:
    tokenizer = character_tokenizer()
    ids = torch.tensor([tokenizer(text.ljust(80))["input_ids"] for text in completions])
    num = len(completions)
    rollout = Rollout(
        prompt_ids=ids,
        prompt_mask=ids > 0,
        completion_ids=ids,
        completion_mask=ids > 1,
        step_map=ids,
        rewards=torch.arange(num)[:, None] / 4,
        num_timesteps=torch.arange(num) + 3,
    )
    problems = [
        Problem(prompt=f"p|{n}\nq", answer="", answer_prefix=prefix) for n in range(num // group_size)
    ]
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=ids > 0,
        problems=problems,
        positions=torch.arange(len(problems)),
        rollout=rollout,
    )


def trainer(step: int, is_global_zero: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        global_step=step,
        is_global_zero=is_global_zero,
        progress_bar_callback=Bar(),
        loggers=[Board()],
        datamodule=SimpleNamespace(template=PromptTemplate(character_tokenizer(), None, 64)),
    )


def show(at: SimpleNamespace, prompts: PromptBatch, **settings) -> None:
    SampleTableCallback(**settings).on_train_batch_end(at, None, None, prompts, 0)


def test_prints_and_logs_the_first_completions():
    at = trainer(20)
    show(at, batch("aa", "b|b", "cc", "dd"), num=3)
    lines = at.progress_bar_callback.text[0].splitlines()
    assert lines[0] == "samples at step 20: reward, timesteps, prompt => completion"
    assert [line.split("=>")[0].split() for line in lines[1:]] == [
        ["0.00", "3", "p|0", "q"],
        ["0.25", "4", "p|0", "q"],
        ["0.50", "5", "p|1", "q"],
    ]
    assert [line.split("=>")[1].strip() for line in lines[1:]] == ["aa", "b|b", "cc"]
    ((tag, table, step),) = at.loggers[0].texts
    assert (tag, step) == ("samples", 19)  # with the scalars of that step
    assert table.splitlines()[:2] == ["| reward | timesteps | prompt | completion |", "|---|---|---|---|"]
    assert len(table.splitlines()) == 5
    # A bar or a line break inside a cell would break the table.
    assert re.fullmatch(r"\| 0\.25 \| 4 \| p\\\|0<br>q \| b\\\|b *\|", table.splitlines()[3])


def test_an_answer_starts_with_its_prefix():
    at = trainer(10)
    show(at, batch("aa", "bb", "cc", "dd", prefix="is: "), num=3)
    lines = at.progress_bar_callback.text[0].splitlines()[1:]
    assert [line.split("=>")[1].strip() for line in lines] == ["is: aa", "is: bb", "is: cc"]


def test_long_texts_are_shortened_on_the_screen_only():
    at, text = trainer(10), "x" * 40 + "y" * 40
    show(at, batch(text, text), num=1)
    shown = at.progress_bar_callback.text[0].splitlines()[1].split("=> ")[1]
    assert len(shown) <= 60
    assert shown.startswith("xxx")
    assert shown.endswith("yyy")
    assert text in at.loggers[0].texts[0][1]


def steps_shown(callback: SampleTableCallback, first: int, last: int, num_updates: int = 1) -> list[int]:
    """The steps that end with a table; only the first update's batch has the rollout."""
    callback.on_train_start(trainer(first), None)
    shown = []
    for step in range(first + 1, last + 1):
        prompts, at = batch("a", "b"), trainer(step)
        if (step - 1) % num_updates:
            prompts.rollout = None
        callback.on_train_batch_end(at, None, None, prompts, 0)
        assert bool(at.progress_bar_callback.text) == bool(at.loggers[0].texts)
        shown += [step] * bool(at.loggers[0].texts)
    return shown


@pytest.mark.parametrize(
    ("every", "first", "num_updates", "expected"),
    [
        (10, 0, 1, [10, 20]),
        (1, 22, 1, [23, 24]),
        (10, 5, 1, [15]),  # after a resume
        (4, 0, 2, [5, 9, 13, 17, 21]),  # rollouts at the odd steps only
        (10, 0, 3, [10, 22]),  # rollouts at 1, 4, 7, 10, 13, 16, 19, 22
    ],
)
def test_shows_every_few_steps(every: int, first: int, num_updates: int, expected: list[int]):
    assert steps_shown(SampleTableCallback(every=every), first, 24, num_updates) == expected


def test_only_rank_0_shows():
    at = trainer(10, is_global_zero=False)
    show(at, batch("a", "b"))
    assert not at.progress_bar_callback.text
    assert not at.loggers[0].texts


def test_no_bar_and_no_rollout_are_fine():
    at = trainer(10)
    at.progress_bar_callback = None
    show(at, batch("a", "b"))
    prompts = batch("a", "b")
    prompts.rollout = None
    show(trainer(10), prompts)


@pytest.mark.parametrize("key", ["every", "num"])
def test_settings_out_of_range(key: str):
    with pytest.raises(ConfigError, match=rf"samples\.{key} is 0: set it to 1 or more"):
        SampleTableCallback(**{key: 0})
