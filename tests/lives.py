"""Runs of `drift fit --resume auto` under several ranks, in lives that end badly: `python lives.py FOLDER`.

FOLDER/jobs.json holds a list of runs, each a name and its lives: the number of ranks, settings, and the
moments at which something happens to some of them. The processes are forked from one parent that has
everything imported: most of a small run is its imports. How each life ended goes to FOLDER/NAME.json, and
what a run has left is in FOLDER/NAME.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import drift.cli
from drift.policy_module import PolicyModule
from drift.resume import step_of

SECONDS = 90.0  # of a life, after which it is taken to hang
CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 4
  val_check_interval: 2
  logger:
    - class_path: lightning.pytorch.loggers.TensorBoardLogger
      init_args: {save_dir: runs, name: killed, default_hp_metric: false}
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: runs, name: killed}
model: {num_updates: 2, optimizer: {lr: 1.0e-5, warmup_steps: 2, schedule: cosine}}
# Of the puzzles of a validation one rank has more than another.
data: {prompts_per_step: 4, num_validation: 5, evaluation_batch_size: 2}
rollout: {group_size: 4, decode: {block_length: 8}, evaluation: {block_length: 8}}
checkpoint: {every: 3}
samples: {every: 1}
progress: {refresh_rate: 0}
doctor: {enabled: false}
watchdog: {timeout_seconds: 30}
"""


def befall(what: str, stage: str, number: int) -> None:
    """Has something happen to this process the `number`th time that it comes to a stage.

    Args:
        what: the name of a signal; `full`: no file of this process can grow as large as a checkpoint any
            more, which the logs are not.
        stage: of training; `validation` and `last validation` for a rollout in one; `write` for a checkpoint
            in the middle.
        number: from 1.
    """
    left = number

    def come() -> None:
        nonlocal left
        left -= 1
        if left:
            return
        if what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), getattr(signal, what))

    report, save = PolicyModule.report, torch.save

    def reported(module: PolicyModule, name: str, done: int, total: int) -> None:
        place = name
        if module.trainer.validating and name == "rollout":
            last = stage == "last validation" and module.trainer.global_step == module.trainer.max_steps
            place = "last validation" if last else "validation"
        if place == stage:
            come()
        report(module, name, done, total)

    def saved(content: object, file: Any, **settings: Any) -> None:
        if not settings:  # a checkpoint
            file.write(b"half of it")
            file.flush()
            come()
            file.seek(0)
        save(content, file, **settings)

    PolicyModule.report = reported  # pyright: ignore[reportAttributeAccessIssue]
    if stage == "write":
        torch.save = saved


def environment(launcher: str, rank: int, num: int, port: int) -> dict[str, object]:
    """What a launcher tells a rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    local = {"LOCAL_RANK": rank, "WORLD_SIZE": num}
    return {
        "none": {},
        "torchrun": common
        | local
        | {"RANK": rank, "LOCAL_WORLD_SIZE": num, "GROUP_RANK": 0}
        # Its store is in rank 0, as with TORCH_DISABLE_SHARE_RDZV_TCP_STORE.
        | {"TORCHELASTIC_RUN_ID": "lives", "TORCHELASTIC_USE_AGENT_STORE": False},
        "lightning": common | local | {"NODE_RANK": 0},
        "slurm": common
        | {"SLURM_JOB_ID": 12, "SLURM_JOB_NAME": "drift", "SLURM_NTASKS": num, "SLURM_NTASKS_PER_NODE": num}
        | {"SLURM_NNODES": 1, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0},
    }[launcher]


def train(folder: Path, life: dict[str, Any], rank: int, num: int) -> int:
    """The exit status of one rank, in this process."""
    os.chdir(folder)
    out = os.open(f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        # Of torchrun's restarts only the first is killed again.
        if str(rank) in life["moments"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            befall(*life["moments"][str(rank)])
        settings = ["--config=quickstart", "--config=run.yaml", *life["settings"], f"--trainer.devices={num}"]
        drift.cli.run(["fit", *settings, "--resume=auto"])
    except SystemExit as error:
        # As the interpreter ends.
        sys.stderr.write(f"{error.code}\n")
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def fork(folder: Path, life: dict[str, Any], rank: int, port: int) -> int:
    """Starts one rank; gives back its process id."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        told = environment(life["launcher"], rank, life["ranks"], port)
        os.environ.update({name: str(value) for name, value in told.items()})
        os._exit(train(folder, life, rank, life["ranks"]))
    return pid


def fork_torchrun(folder: Path, life: dict[str, Any]) -> int:
    """Starts what `torchrun --standalone --max-restarts 2` does; gives back its process id."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        num = life["ranks"]
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num,
            run_id="lives",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=2,
            start_method="fork",
        )
        status = 1
        try:
            elastic_launch(config, in_torchrun)(folder, life, num)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def in_torchrun(folder: Path, life: dict[str, Any], num: int) -> None:
    """One rank of torchrun, which waits for what it gives back."""
    rank = int(os.environ["RANK"])
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        time.sleep(2.0 * rank)  # whoever is first looks for the others where they were before
    status = train(folder, life, rank, num)
    if status:
        os._exit(status)


def live(folder: Path, life: dict[str, Any]) -> dict[str, Any]:
    """One life of a run: the exit status of every process, its seconds, and the checkpoints it leaves."""
    begin = time.monotonic()
    if life["launcher"] == "restarting":
        running = {fork_torchrun(folder, life): 0}
    else:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        running = {fork(folder, life, rank, port): rank for rank in range(life["ranks"])}
    statuses: list[int | str] = ["hangs"] * len(running)
    while running and time.monotonic() - begin < SECONDS:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    files = sorted(folder.glob("runs/killed/*/checkpoints/*"))
    return {
        "statuses": statuses,
        "seconds": round(time.monotonic() - begin, 1),
        "files": [path.name for path in files],
        "step": next((step_of(path) for path in files if path.name == "last.ckpt"), None),
    }


def main(folder: Path) -> None:
    """Runs all jobs, one after the other."""
    torch.set_num_threads(1)
    for job in json.loads((folder / "jobs.json").read_text(encoding="utf-8")):
        place = folder / job["name"]
        place.mkdir()
        (place / "run.yaml").write_text(CONFIG, encoding="utf-8")
        lives = []
        for life in job["lives"]:
            lives.append(live(place, life))
            sys.stdout.write(f"{job['name']}: {lives[-1]}\n")
            sys.stdout.flush()
        (folder / f"{job['name']}.json").write_text(json.dumps(lives), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
