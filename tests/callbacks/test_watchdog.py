"""A rank that stops is named by the others, which end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drift.callbacks import RolloutCallback, WatchdogCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 8.0
SCRIPT = """
import os, signal, sys, time
from lightning import Trainer
from lightning.fabric.strategies.launchers import subprocess_script
from drift.callbacks import RescueCallback, RolloutCallback, WatchdogCallback
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

victim, how, timeout = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
# The launcher looks every 5 s and kills all where it finds a process dead: here, always before they find out.
subprocess_script._ChildProcessObserver.__init__.__defaults__ = (0.2,)

class StoppingReward(PerSampleReward):
    def score(self, completion, problem):
        if trainer.global_step == 2 and trainer.global_rank == victim:
            time.sleep(0.5)  # the others learn of a new stage a tenth of a second later
            print("stopped at", time.time(), os.getpid(), flush=True)
            if how == "sleep":
                time.sleep(600)
            os.kill(os.getpid(), {"SIGSTOP": signal.SIGSTOP, "SIGKILL": signal.SIGKILL}[how])
        return 0.0

task = SudokuTask()
task.reward = StoppingReward()
decode = DenoiseConfig(block_length=16)
rollout = RolloutCallback(group_size=2, completion_length=16, decode=decode, evaluation=decode)
trainer = Trainer(
    max_steps=4, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, use_distributed_sampler=False, limit_val_batches=0,
    callbacks=[WatchdogCallback(timeout), rollout, RescueCallback()],
)
trainer.fit(RLDFModule("sudoku_base"), PromptDataModule(task, prompts_per_step=2))
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.two_ranks
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("launcher", "victim", "how"),
    [
        ("lightning", 1, "SIGSTOP"),
        ("lightning", 1, "SIGKILL"),
        ("lightning", 1, "sleep"),
        ("torchrun", 0, "SIGSTOP"),
    ],
)
def test_the_others_name_the_rank_that_stopped_and_end(tmp_path: Path, launcher: str, victim: int, how: str):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), str(script)]
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*command, str(victim), how, str(TIMEOUT)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            stopped_at, pid = next(
                (float(words[2]), int(words[3]))
                for words in map(str.split, process.stdout)
                if words[:1] == ["stopped"]
            )
            said = until(errors, f"rank {victim} was last seen in stage 'reward' of step 2, ", 60.0)
            seconds = time.time() - stopped_at
            status = process.wait(90)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert status != 0
    assert not is_running(pid)
    # Of a process that is gone the others hear at once; else they wait as long as they may.
    assert seconds < 5 if how == "SIGKILL" else TIMEOUT - 2 < seconds < TIMEOUT + 6
    lines = [line for line in said.splitlines() if "was last seen in stage" in line]
    assert re.match(rf"  rank {victim} was last seen in stage 'reward' of step 2, \d+ s ago", lines[0])
    assert any(line.startswith(f"  rank {1 - victim} was last seen in stage ") for line in lines)
    if how == "sleep":
        assert "train.py:22 in score)" in lines[0]
    if how == "SIGKILL":
        assert said.count("drift: ") == 1
        assert f"drift: rank {victim} was killed by signal {signal.SIGKILL:d}:" in said
    if how == "SIGSTOP":
        assert "and has given no sign for" in lines[0]


def until(file: Path, words: str, seconds: float) -> str:
    """What stands in a file as soon as some words do, and what follows at once."""
    deadline = time.monotonic() + seconds
    while words not in (text := file.read_text()):
        assert time.monotonic() < deadline, text[-3000:]
        time.sleep(0.1)
    time.sleep(0.5)
    return file.read_text()


def test_one_process_is_not_watched(tiny_folder, spread_task, make_trainer):
    decode = DenoiseConfig(block_length=16, threshold=0.5)
    rollout = RolloutCallback(group_size=2, completion_length=16, decode=decode, evaluation=decode)
    watchdog = WatchdogCallback(1e-3)
    make_trainer(2, callbacks=[watchdog, rollout]).fit(
        RLDFModule(str(tiny_folder)), datamodule=PromptDataModule(spread_task, prompts_per_step=2)
    )
    assert watchdog.watch is None


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_that_is_none_is_refused(seconds: float):
    with pytest.raises(ConfigError, match=r"watchdog\.timeout_seconds is .*or null for no watchdog"):
        WatchdogCallback(seconds)
