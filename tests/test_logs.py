import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drift.logs import PastLogs, flush


@pytest.fixture
def log(tmp_path: Path):
    """Logs steps under the names given, as one start of a run; those before `cut` are kept."""

    def write(steps: range, *names: str, cut: int | None = None) -> None:
        loggers = [kind(tmp_path, "run", 0) for kind in (TensorBoardLogger, CSVLogger)]
        if cut is not None:
            past = PastLogs(loggers)
        loggers[0].experiment.add_text("prompt", "2+2?", 0)
        if cut is not None:
            past.cut(cut)
        for logger in loggers:
            for step in steps:
                logger.log_metrics(dict.fromkeys(names, step / 2), step)
        flush(loggers)

    return write


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "version_0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curves(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "run" / "version_0"), purge_orphaned_data=False)
    return events.Reload()


def test_each_step_is_there_once(log, tmp_path: Path):
    log(range(7), "loss")
    log(range(4, 9), "loss", cut=4)
    log(range(2, 5), "loss", cut=2)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(str(n), str(n / 2)) for n in range(5)]
    events = curves(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, n / 2) for n in range(5)]
    assert len(events.Tensors("prompt/text_summary")) == 1


def test_a_run_without_a_checkpoint_logs_from_the_start(log, tmp_path: Path):
    log(range(3), "loss")
    log(range(2), "loss", cut=0)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1"]
    assert [event.step for event in curves(tmp_path).Scalars("loss")] == [0, 1]


def test_new_columns_and_a_line_that_was_cut_short(log, tmp_path: Path):
    log(range(12), "loss")
    file = tmp_path / "run" / "version_0" / "metrics.csv"
    file.write_bytes(file.read_bytes()[:-6])  # of "5.5,11": it reads as another step
    log(range(11, 13), "accuracy", "loss", cut=11)
    assert [row["step"] for row in rows(tmp_path)] == [str(n) for n in range(13)]
    assert [row["accuracy"] for row in rows(tmp_path)] == [""] * 11 + ["5.5", "6.0"]


def test_a_record_that_was_cut_short_is_dropped(log, tmp_path: Path):
    log(range(6), "loss")
    (file,) = (tmp_path / "run" / "version_0").glob("events*")
    file.write_bytes(file.read_bytes()[:-5])
    log(range(5, 7), "loss", cut=5)
    assert [event.step for event in curves(tmp_path).Scalars("loss")] == list(range(7))
