import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from drift.contract import ConfigError
from drift.resume import (
    Run,
    differences,
    meet_anew,
    named_checkpoint,
    require_checkpoint,
    starting_checkpoint,
    step_of,
)

SETTINGS = {
    "resume": "auto",
    "ckpt_path": None,
    "trainer": {"max_steps": 10, "devices": 1, "precision": "32-true"},
    "model": {"optimizer": {"lr": 0.1}},
    "checkpoint": {"dirpath": None, "every": 5},
}


def settings(**changes: object) -> dict:
    found = yaml.safe_load(yaml.safe_dump(SETTINGS))
    for key, value in changes.items():
        *path, name = key.split("__")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return found


def write(path: Path, step: int, age: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "w": torch.zeros(1000)}, path)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def earlier(root: Path, version: int, found: dict, step: int | None = 4) -> Path:
    folder = root / "runs" / "name" / f"version_{version}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(found))
    if step is not None:
        write(folder / "checkpoints" / "last.ckpt", step, 0)
    return folder


@pytest.fixture
def trainer(tmp_path: Path):
    def make(version: str | None = None) -> SimpleNamespace:
        loggers = [kind(tmp_path / "runs", "name", version) for kind in (TensorBoardLogger, CSVLogger)]
        return SimpleNamespace(loggers=loggers, default_root_dir=str(tmp_path))

    return make


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def test_the_same_command_finds_its_run_and_no_other(trainer, tmp_path: Path):
    mine = earlier(tmp_path, 0, settings())
    earlier(tmp_path, 1, settings(model__optimizer__lr=0.2))
    # How far and on what a run goes makes no other run of it.
    again = settings(trainer__max_steps=20, trainer__devices=4)
    at = trainer()
    assert starting_checkpoint(at, again) == str(mine / "checkpoints" / "last.ckpt")
    assert [logger.version for logger in at.loggers] == [0, 0]
    at = trainer()
    assert starting_checkpoint(at, settings(model__optimizer__lr=0.3)) is None
    assert [logger.version for logger in at.loggers] == [2, 2]


@pytest.mark.parametrize(
    "setting",
    [
        "model.micro_batch_size",
        "model.micro_batch_tokens",
        "rollout.batch_size",
        "samples.every",
        "prompt.max_characters",
        "curve.enabled",
        "doctor.enabled",
        "collapse.no_spread",
        "watchdog.timeout_seconds",
        "trainer.log_every_n_steps",
        "verbose",
    ],
)
def test_what_saves_memory_watches_or_is_only_shown_makes_no_other_run(trainer, tmp_path: Path, setting: str):
    mine = earlier(tmp_path, 0, settings())
    found = starting_checkpoint(trainer(), settings(**{setting.replace(".", "__"): 7}))
    assert found == str(mine / "checkpoints" / "last.ckpt")


def test_without_a_logger_the_checkpoints_say_whose_they_are(tmp_path: Path):
    at = SimpleNamespace(loggers=[], default_root_dir=str(tmp_path))
    assert starting_checkpoint(at, settings()) is None
    (tmp_path / "checkpoints").mkdir()
    assert starting_checkpoint(at, settings()) is None
    last = write(tmp_path / "checkpoints" / "last.ckpt", 3, 0)
    (last.parent / "config.yaml").write_text(yaml.safe_dump(settings()))
    assert starting_checkpoint(at, settings()) == str(last)
    assert starting_checkpoint(at, settings(resume=None, ckpt_path="last")) == str(last)
    with pytest.raises(
        ConfigError, match=r"is of another run: it differs in model\.optimizer\.lr; set check"
    ):
        starting_checkpoint(at, settings(model__optimizer__lr=0.2))


def test_the_newest_of_several_runs_is_gone_on_with(trainer, tmp_path: Path):
    for version in (2, 10, 9):
        earlier(tmp_path, version, settings(), version)
    at = trainer()
    assert starting_checkpoint(at, settings()).split("/")[-3] == "version_10"
    assert at.loggers[0].version == 10


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_in_place(trainer, tmp_path: Path):
    earlier(tmp_path, 3, settings(), step=None)
    at = trainer()
    assert starting_checkpoint(at, settings()) is None
    assert at.loggers[0].version == 3


def test_a_folder_that_is_named_is_the_run(trainer, tmp_path: Path):
    last = write(tmp_path / "kept" / "last.ckpt", 7, 0)
    assert starting_checkpoint(trainer(), settings(checkpoint__dirpath=str(last.parent))) == str(last)
    last = write(tmp_path / "runs" / "name" / "mine" / "checkpoints" / "last.ckpt", 7, 0)
    assert starting_checkpoint(trainer("mine"), settings()) == str(last)
    assert step_of(last) == 7


def test_last_is_that_of_the_newest_run_whatever_its_settings(trainer, tmp_path: Path):
    earlier(tmp_path, 0, settings())
    other = earlier(tmp_path, 1, settings(model__optimizer__lr=0.2))
    earlier(tmp_path, 2, settings(), step=None)
    named = settings(resume=None, ckpt_path="last")
    assert starting_checkpoint(trainer(), named) == str(other / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match=r"ckpt_path is 'best': there is no .*/best\.ckpt; give the path"):
        starting_checkpoint(trainer(), settings(resume=None, ckpt_path="best"))
    with pytest.raises(ConfigError, match="ckpt_path is 'last': there is no earlier run"):
        named_checkpoint(None, "last")
    # A path is taken as it is, and what goes on from it is another run.
    assert starting_checkpoint(trainer(), settings(resume=None, ckpt_path="a.ckpt")) == "a.ckpt"


def test_a_damaged_checkpoint_gives_way_to_the_newest_whole_one_loudly(tmp_path: Path):
    run = Run(tmp_path, tmp_path / "checkpoints")
    assert run.newest() is None
    ages = {"last": 1, "best": 0, "previous": 2}
    last, best, previous = (
        write(run.checkpoints / f"{name}.ckpt", 5, age * 100) for name, age in ages.items()
    )
    rescue = write(tmp_path / "rescue.ckpt", 9, 300)
    assert run.newest() == last
    os.utime(rescue, (2_000_000, 2_000_000))
    assert run.newest() == rescue
    for broken, expected in ((rescue, last), (last, best), (best, previous), (previous, None)):
        damaged(broken)
        with pytest.warns(UserWarning, match=rf"resume: {broken} is left out: it is cut short"):
            assert run.newest() == expected


def test_what_was_rescued_long_ago_comes_after_what_was_written_since(tmp_path: Path):
    run = Run(tmp_path, tmp_path / "checkpoints")
    rescue = write(tmp_path / "rescue.ckpt", 5, 900)
    assert run.newest() == rescue
    last, previous = (
        write(run.checkpoints / f"{name}.ckpt", 9, age) for name, age in (("last", 1), ("previous", 200))
    )
    damaged(last)
    with pytest.warns(UserWarning, match="is left out"):
        assert run.newest() == previous
    damaged(previous)
    with pytest.warns(UserWarning, match="is left out"):
        assert run.newest() == rescue


def test_what_differs_is_named(tmp_path: Path):
    file = tmp_path / "config.yaml"
    assert differences(file, settings()) == ["config.yaml, which it does not have"]
    file.write_text(yaml.safe_dump(settings()))
    assert differences(file, settings(trainer__max_steps=5, checkpoint__every=1)) == []
    assert differences(file, settings(trainer__precision="bf16-mixed")) == ["trainer.precision"]
    file.write_text("a: [")
    assert differences(file, settings()) == ["config.yaml, which cannot be read"]


def test_what_cannot_be_asked_for():
    require_checkpoint("last", None, "fit")
    require_checkpoint(None, "auto", "fit")
    with pytest.raises(ConfigError, match="resume is 'auto': only training goes on; give ckpt_path"):
        require_checkpoint(None, "auto", "test")
    with pytest.raises(ConfigError, match=r"resume is 'auto' and ckpt_path 'a\.ckpt': give one of the two"):
        require_checkpoint("a.ckpt", "auto", "fit")
    with pytest.raises(ConfigError, match=r"ckpt_path is 'a\.ckpt': there is no such file"):
        require_checkpoint("a.ckpt", None, "fit")


@pytest.fixture
def torchrun(monkeypatch):
    """What torchrun tells a rank."""

    def tell(shared: bool, machines: int, restarts: int, starts: int) -> None:
        told = {
            "MASTER_PORT": 4000,
            "GROUP_WORLD_SIZE": machines,
            "TORCHELASTIC_USE_AGENT_STORE": shared,
            "TORCHELASTIC_MAX_RESTARTS": restarts,
            "TORCHELASTIC_RESTART_COUNT": starts,
        }
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

    return tell


@pytest.mark.parametrize(
    ("shared", "machines", "starts", "port"),
    [(True, 1, 0, 4000), (True, 1, 2, 4002), (False, 1, 2, 4000), (False, 2, 2, 4000)],
)
def test_ranks_that_start_again_meet_elsewhere(torchrun, shared: bool, machines: int, starts: int, port: int):
    torchrun(shared, machines, 3, starts)
    meet_anew()
    assert os.environ["MASTER_PORT"] == str(port)
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == str(shared and starts == 0)


def test_restarts_on_several_machines_need_a_store_of_their_own(torchrun, monkeypatch):
    torchrun(True, 2, 3, 0)
    with pytest.raises(ConfigError, match=r"--max-restarts is 3: .*set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        meet_anew()
    torchrun(True, 2, 0, 0)
    meet_anew()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    meet_anew()
