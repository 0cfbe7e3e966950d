import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from drift.contract import ConfigError
from drift.signals import SignalWatch, Stopped, requeue_job, requeue_signal

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import os, signal, sys, time
from drift import signals
watch = signals.SignalWatch(last_words=lambda number: print("last words", number, flush=True))
assert watch.start()
for number, pause in {plan}:
    os.kill(os.getpid(), number)
    time.sleep(pause)
print("pending", watch.pending)
"""
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("plan", "status", "out"),
    [
        ([(TERM, 0)], 0, f"pending {TERM}"),
        ([(INT, 0)], 0, f"pending {INT}"),
        ([(USR1, 0)], 0, f"pending {USR1}"),
        # What a launcher passes on is no second wish.
        ([(INT, 0.1), (TERM, 0.1), (INT, 0)], 0, f"pending {INT}"),
        ([(INT, 1.1), (INT, 0)], -INT, f"last words {INT}"),
        ([(TERM, 1.1), (INT, 0)], -INT, f"last words {INT}"),
        # A notice is not the end of the time.
        ([(USR1, 1.1), (TERM, 0)], 0, f"pending {USR1}"),
        ([(USR1, 0), (TERM, 1.1), (TERM, 0)], -TERM, f"last words {TERM}"),
    ],
)
def test_the_first_is_noted_and_the_second_ends(plan: list, status: int, out: str):
    code = SCRIPT.format(plan=[(int(number), pause) for number, pause in plan])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (status, out)
    name = signal.Signals(plan[0][0]).name
    assert done.stderr.count(f"drift: {name}: saving a checkpoint, then stopping") == 1


def test_the_exit_status_is_that_of_shells():
    assert (Stopped(TERM).code, Stopped(INT).code, Stopped(USR1).code) == (143, 130, 138)
    assert Stopped(TERM).name == "SIGTERM"


def test_only_slurm_requeues():
    assert requeue_signal(LightningEnvironment()) is None
    assert requeue_signal(SLURMEnvironment(auto_requeue=False)) is None
    assert requeue_signal(SLURMEnvironment()) == USR1
    assert requeue_signal(SLURMEnvironment(requeue_signal=signal.SIGHUP)) == signal.SIGHUP
    assert signal.SIGHUP in SignalWatch(also=signal.SIGHUP).numbers


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch):
    """A SLURM that writes down what it is told, and refuses job 13."""
    file = tmp_path / "scontrol"
    file.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            echo "$@" >> {tmp_path / "told"}
            if [ "$2" = 13 ]; then echo "Invalid job id" >&2; exit 1; fi
            """
        )
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "told"


def test_a_job_is_put_back_into_the_queue(scontrol: Path, monkeypatch):
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is ''"):
        requeue_job()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert requeue_job() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue_job() == "7_3"
    assert scontrol.read_text().splitlines() == ["requeue 12", "requeue 7_3"]


def test_what_slurm_says_is_passed_on(scontrol: Path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.raises(ConfigError, match=r"SLURM job 13 could not .*: Invalid job id; submit it again"):
        requeue_job()
