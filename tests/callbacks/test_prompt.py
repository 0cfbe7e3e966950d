from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from drift.callbacks import PromptCallback, RolloutCallback
from drift.contract import ConfigError, Problem
from drift.data import PromptDataModule, PromptTemplate
from drift.models.characters import character_tokenizer
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig

CHAT = "<|mask|>{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}[assistant]"


class Board(TensorBoardLogger):
    def __init__(self) -> None:
        self.texts = []

    @property
    def experiment(self):
        return SimpleNamespace(add_text=lambda *args: self.texts.append(args))


def trainer(problem: Problem | None, is_global_zero: bool = True, **settings) -> SimpleNamespace:
    template = PromptTemplate(
        character_tokenizer(), **{"system_prompt": None, "max_length": 10_000} | settings
    )
    data = SimpleNamespace(
        template=template, tokenizer=template.tokenizer, examples=[problem] if problem else []
    )
    return SimpleNamespace(datamodule=data, is_global_zero=is_global_zero, loggers=[Board(), object()])


def shown(at: SimpleNamespace, capsys, stage: str = "fit", **settings) -> list[str]:
    PromptCallback(**settings).setup(at, None, stage)
    return capsys.readouterr().out.splitlines()


def ask(prompt: str, prefix: str = "") -> Problem:
    return Problem(prompt=prompt, answer="", answer_prefix=prefix)


@pytest.mark.parametrize(
    ("stage", "split"),
    [("fit", "training"), ("validate", "validation"), ("test", "test"), ("predict", "test")],
)
def test_the_whole_prompt_is_shown_and_logged(capsys, stage: str, split: str):
    at = trainer(ask("2+2?", "It is "), system_prompt="Be brief.")
    lines = shown(at, capsys, stage)
    # 9 + 1 + 4 + 1 + 6 characters
    assert lines == [
        f"--- first {split} prompt, 21 tokens, bare text ---",
        "Be brief.",
        "2+2?",
        "It is",
        "---",
    ]
    assert at.loggers[0].texts == [("prompt", "21 tokens\n\n    Be brief.\n    2+2?\n    It is ", 0)]


def test_special_tokens_are_shown(capsys):
    text = CHAT.replace("<|mask|>", "<|endoftext|>")
    lines = shown(trainer(ask("2+2?"), chat_template=text), capsys)
    assert lines[0] == "--- first training prompt, 22 tokens, the chat template ---"
    assert lines[1] == "<|endoftext|>[user]2+2?[assistant]"


def test_a_long_prompt_is_cut_on_the_screen_only(capsys):
    text = "x" * 50 + "y" * 1000 + "z" * 51
    at = trainer(ask(text))
    assert shown(at, capsys, max_characters=101)[1:] == [
        "x" * 50 + "y",
        "[... 1000 characters ...]",
        "z" * 50,
        "---",
    ]
    assert text in at.loggers[0].texts[0][1]
    assert shown(trainer(ask("x" * 101)), capsys, max_characters=101)[1] == "x" * 101


def test_0_characters_are_only_logged(capsys):
    at = trainer(ask("2+2?"))
    assert shown(at, capsys, max_characters=0) == []
    assert len(at.loggers[0].texts) == 1


@pytest.mark.parametrize(
    "at",
    [
        trainer(ask("2+2?"), is_global_zero=False),
        trainer(None),
        SimpleNamespace(datamodule=None, is_global_zero=True, loggers=[]),
    ],
)
def test_other_ranks_and_runs_without_prompts_show_nothing(capsys, at: SimpleNamespace):
    assert shown(at, capsys) == []
    assert not [logger for logger in at.loggers if getattr(logger, "texts", [])]


def test_a_prompt_that_cannot_be_used_is_named(capsys):
    with pytest.raises(ConfigError, match="the first training prompt: its prompt has 11 tokens"):
        shown(trainer(ask("x" * 11), max_length=10), capsys)


def test_a_negative_width_is_refused():
    with pytest.raises(ConfigError, match=r"prompt\.max_characters is -1: set it to 0"):
        PromptCallback(max_characters=-1)


def test_in_a_run_it_comes_before_the_weights(
    tiny_folder, spread_task, make_trainer, tmp_path: Path, capsys, monkeypatch
):
    order = []
    monkeypatch.setattr(
        RLDFModule, "configure_model", lambda self: order.append(capsys.readouterr().out) or 1 / 0
    )
    decode = DenoiseConfig(block_length=16)
    at = make_trainer(
        callbacks=[RolloutCallback(completion_length=16, decode=decode, evaluation=decode), PromptCallback()],
        logger=TensorBoardLogger(tmp_path),
    )
    data = PromptDataModule(spread_task, prompts_per_step=2)
    with pytest.raises(ZeroDivisionError):
        at.fit(RLDFModule(str(tiny_folder)), datamodule=data)
    puzzle = spread_task.row("train", 0)["puzzle"]
    assert order == [f"--- first training prompt, 16 tokens, bare text ---\n{puzzle}\n---\n"]
