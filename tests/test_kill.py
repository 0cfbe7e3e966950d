"""Real processes that are killed, stopped and told to go on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks" / "bench_kill.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def killed(num: int) -> dict:
    done = subprocess.run(
        [sys.executable, str(BENCH), f"--kills={num}"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("num", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_is_the_undisturbed_one(num: int):
    found = killed(num)
    assert found["differing"] == []
    assert found["kills"] == found["identical"] == num
    assert found["compared"] > 1000  # tensors, values and curves


def test_the_comparison_sees_what_differs():
    spec = importlib.util.spec_from_file_location("bench_kill", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    one = {"a": b"1", "b": [(0, 1.0)]}
    assert bench.differences(one, dict(one)) == []
    assert bench.differences(one, one | {"b": [(0, 1.0), (0, 1.0)]}) == ["b"]
    assert bench.differences(one, {"a": b"1"}) == ["b"]


@pytest.fixture
def fit(tmp_path: Path):
    """Starts a real `drift fit --resume auto`; its output goes to out.txt."""

    def start(*arguments: str) -> subprocess.Popen:
        settings = (
            "--trainer.max_steps=200",
            "--data.prompts_per_step=2",
            "--data.num_validation=4",
            "--rollout.group_size=2",
            "--progress.refresh_rate=0",
            "--checkpoint.every=1000",
            "--doctor.enabled=false",
        )
        call = [sys.executable, "-m", "drift", "fit", "--config=quickstart", "--resume=auto"]
        with (tmp_path / "out.txt").open("a") as out:
            return subprocess.Popen(
                [*call, *settings, *arguments], cwd=tmp_path, env=ENVIRONMENT, stdout=out, stderr=out
            )

    return start


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(fit, tmp_path: Path, number: int, status: int):
    process = fit()
    folder = tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints"
    wait_for(folder / "best.ckpt", process)  # after ten steps
    process.send_signal(number)
    assert process.wait(60) == status
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert 10 <= last["global_step"] < 200
    step, out = last["global_step"], (tmp_path / "out.txt").read_text()
    assert f"drift: stopped by {signal.Signals(number).name} after step {step}: runs/quickstart" in out
    assert "Traceback" not in out
    assert fit(f"--trainer.max_steps={step + 1}").wait(120) == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == step + 1
    assert len(list((tmp_path / "runs" / "quickstart").iterdir())) == 1
    assert fit(f"--trainer.max_steps={step + 1}").wait(120) == 0  # nothing is left to do
    assert "nothing was left to do" in (tmp_path / "out.txt").read_text()
