"""Runs that are killed (SIGKILL) again and again and told to go on, against one that is left in peace.

Every life ends in a rollout, in a backward pass, while a checkpoint is being written, or at any time at all;
the next goes on by `--resume auto`. What is left at the end must be the undisturbed run, bit by bit: weights,
optimizer, schedule, callbacks, random streams, and of the logs every step's figures, prompts and answers
once. Only seconds may differ. Prints one JSON line, and keeps it with --record.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves_with_path

import drift.cli
import drift.storage
from drift.module import RLDFModule
from drift.policy_module import PolicyModule

NUM_STEPS = 12
KINDS = ("rollout", "backward", "write", "any")
CONFIG = """
trainer:
  max_steps: 12
  val_check_interval: 4
  callbacks:
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val/accuracy, mode: max, patience: 100}
  logger:
    - class_path: lightning.pytorch.loggers.TensorBoardLogger
      init_args: {save_dir: runs, name: killed, default_hp_metric: false}
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: runs, name: killed}
model: {num_updates: 2, optimizer: {lr: 1.0e-3, warmup_steps: 5, schedule: cosine}}
data: {prompts_per_step: 4, num_validation: 16}
rollout: {group_size: 4, decode: {block_length: 4}}
checkpoint: {every: 3}
samples: {every: 1}
progress: {refresh_rate: 0}
"""


def start(folder: Path, moment: Callable[[], None] | None = None) -> int:
    """Starts the command in a process of its own; gives back its id. `moment` decides where it will end."""
    pid = os.fork()  # the libraries are loaded already
    if pid:
        return pid
    status = 1
    try:
        os.chdir(folder)
        out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if moment is not None:
            moment()
        Path("killed.yaml").write_text(CONFIG, encoding="utf-8")
        drift.cli.run(["fit", "--config", "quickstart", "--config", "killed.yaml", "--resume", "auto"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class KillAt:
    """Makes this process kill itself the `number`th time that it comes to a place.

    Args:
        kind: of the place, one of KINDS but `any`.
        number: from 1.
        share: of the checkpoint's bytes that are written before.
    """

    def __init__(self, kind: str, number: int, share: float) -> None:
        self.kind = kind
        self.left = number
        self.share = share

    def __call__(self) -> None:
        """Waits for the moment."""
        {"rollout": self.in_rollout, "backward": self.in_backward, "write": self.in_writing}[self.kind]()

    def come(self) -> bool:
        """Whether this is the time."""
        self.left -= 1
        return self.left == 0

    def in_rollout(self) -> None:
        """Between two blocks of a rollout, in training or in validation."""
        report = PolicyModule.report

        def reported(module: PolicyModule, stage: str, done: int, total: int) -> None:
            if stage == "rollout" and self.come():
                kill()
            report(module, stage, done, total)

        PolicyModule.report = reported

    def in_backward(self) -> None:
        """When the first weight's gradient comes."""
        plain = RLDFModule.manual_backward

        def hooked(module: Any, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            if self.come():
                next(module.policy.parameters()).register_hook(kill)
            plain(module, loss, *args, **kwargs)

        RLDFModule.manual_backward = hooked

    def in_writing(self) -> None:
        """When a part of a checkpoint is on the disk."""
        plain = torch.save

        def cut(checkpoint: object, file: Any) -> None:
            whole = io.BytesIO()
            plain(checkpoint, whole)
            content = whole.getvalue()
            last = self.come()
            file.write(content[: int(len(content) * self.share)] if last else content)
            file.flush()
            if last:
                kill()

        torch.save = cut


def kill(*_: object) -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def life(folder: Path, kind: str, draw: random.Random, seconds: float) -> bool:
    """One life of the run; whether it was killed, or came to the end before."""
    if kind == "any":
        pid = start(folder)
        time.sleep(draw.uniform(0.3, 1.0) * seconds)
        os.kill(pid, signal.SIGKILL)
    else:
        most = {"rollout": 12, "backward": 5, "write": 2}[kind]
        pid = start(folder, KillAt(kind, draw.randint(1, most), draw.random()))
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    require_end(folder, status)
    return False


def undisturbed(folder: Path) -> float:
    """Runs to the end in one life; gives back its seconds."""
    begin = time.perf_counter()
    _, status = os.waitpid(start(folder), 0)
    require_end(folder, status)
    return time.perf_counter() - begin


def require_end(folder: Path, status: int) -> None:
    """Raises where a run has ended by an error of its own."""
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError((folder / "out.txt").read_text(encoding="utf-8")[-3000:])


def results(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for seconds: by name, comparable with ==."""
    # A life that ends before it has written its settings leaves a folder that is not gone on with.
    (last,) = folder.glob("runs/killed/*/checkpoints/last.ckpt")
    run = last.parent.parent
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["loops"]  # how often validation was begun
    found = {}
    for path, leaf in tree_leaves_with_path(checkpoint):
        content = leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else str(leaf)
        name = "checkpoint" + "".join(map(str, path))
        found[name.replace(run.name, "RUN")] = (
            content if isinstance(content, bytes) else content.replace(run.name, "RUN")
        )
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in csv.DictReader(file)]
    found["metrics.csv"] = rows
    events = EventAccumulator(str(run), {"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if not tag.endswith("seconds"):
            found[f"scalar {tag}"] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["tensors"]:
        found[f"text {tag}"] = [
            (event.step, event.tensor_proto.string_val[0]) for event in events.Tensors(tag)
        ]
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The names of what differs between two runs."""
    return [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]


def run(num_kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills as often as asked, several times in one run; gives back what came of it."""
    draw = random.Random(seed)
    (folder / "whole").mkdir()
    seconds = undisturbed(folder / "whole")
    expected = results(folder / "whole")
    if sum(row["reward/mean"] != "" for row in expected["metrics.csv"]) != NUM_STEPS:
        raise RuntimeError("the undisturbed run has not logged a reward for each of its steps")
    kinds = [KINDS[number % len(KINDS)] for number in range(num_kills)]
    draw.shuffle(kinds)
    done: list[str] = []
    differing: list[str] = []
    runs = identical = 0
    while len(done) < num_kills:
        place = folder / f"killed_{runs}"
        place.mkdir()
        runs += 1
        before = len(done)
        for kind in kinds[before : before + 5]:
            if not life(place, kind, draw, seconds):
                break
            done.append(kind)
        if len(done) < before + 5:
            require_end(place, os.waitpid(start(place), 0)[1])
        else:
            undisturbed(place)
        wrong = differences(expected, results(place))
        differing += wrong
        identical += 0 if wrong else len(done) - before
    return {
        "kills": len(done),
        "identical": identical,
        "differing": differing[:20],
        "by_moment": dict(Counter(done)),
        "runs": runs,
        "seed": seed,
        "compared": len(expected),
    }


def main() -> None:
    """Kills, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/kill.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.kills, options.seed, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    line = {
        "bench": "kill",
        **found,
        "steps": NUM_STEPS,
        "seconds": round(time.perf_counter() - begin),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(line))
    if options.record:
        path = Path(__file__).parent / "results" / "kill.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    if found["differing"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
