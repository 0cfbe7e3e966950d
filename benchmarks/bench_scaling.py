"""What sharding leaves on each rank, and what the ranks say to each other for it.

Measured on the shipped tiny policy with 1, 2 and 4 processes that talk over gloo, for a few steps of
training. Counted for LLaDA-8B on 8 and 64 ranks with PyTorch's fake process group: the real code runs on
tensors without memory, so that shapes and collectives are those of a real run. Prints one JSON line; --write
keeps it in benchmarks/results, with a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer, seed_everything
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from drift.callbacks import RolloutCallback
from drift.data import PromptDataModule
from drift.distributed import Collectives, gather_over_ranks, gathered, shard, world_size
from drift.losses import LossConfig
from drift.models import DiffusionLM
from drift.models.known import find_config
from drift.models.weights import default_dtype
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig, build_optimizer, clip_gradients
from drift.plan import PlanSettings, plan_memory, policy_sizes
from drift.rollout import DenoiseConfig
from drift.samplers import WeightedSampler
from drift.strategy import ShardedStrategy
from drift.tasks import SudokuTask

KNOWN = "GSAI-ML/LLaDA-8B-Instruct"
KINDS = ("parameters", "gradients", "optimizer", "reference")
RESULTS = Path(__file__).parent / "results"


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes that this rank holds of some tensors."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return sum(part.numel() * part.element_size() for part in parts)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Moments and master weights; the step counters are single numbers on the host."""
    return [value for state in optimizer.state.values() for value in state.values() if value.dim()]


class Meter(Callback):
    """Weighs what each rank holds when the optimizer steps, and counts collectives by the part of a step."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.counts: dict[str, Counter[str]] = {"rollout": Counter(), "update": Counter()}
        self.passes = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts from here on."""
        pl_module.experience = self.counted("rollout", pl_module.experience)
        pl_module.training_step = self.counted("update", pl_module.training_step)

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose collectives are counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with Collectives(self.counts[part]):
                return function(*args, **kwargs)

        return run

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Weighs while there is everything: from the second step on the optimizer has its state."""
        parameters = list(pl_module.policy.parameters())
        self.bytes = {
            "parameters": held(parameters),
            "gradients": held(p.grad for p in parameters),
            "optimizer": held(state_of(optimizer)),
            "reference": held(pl_module.reference.parameters()),
        }

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Counts the rollout's passes."""
        self.passes += pl_module.learned.num_forwards


def measured(gather: bool, denoising_steps: int, num_steps: int) -> dict[str, Any]:
    """A few steps of the tiny policy: the fullest rank's bytes, and rank 0's collectives a step."""
    seed_everything(0, verbose=False)
    module = RLDFModule(
        "sudoku_base",
        sampler=WeightedSampler(k=2),
        loss=LossConfig(beta=0.01),
        micro_batch_size=64,
        gather_for_rollout=gather,
    )
    data = PromptDataModule(SudokuTask(), prompts_per_step=4)
    decode = DenoiseConfig(block_length=16, threshold=None, steps=denoising_steps, temperature=1.0)
    rollout = RolloutCallback(group_size=2, completion_length=16, decode=decode, evaluation=decode)
    meter = Meter()
    trainer = Trainer(
        max_steps=num_steps,
        accelerator="cpu",
        devices=world_size(),
        strategy=ShardedStrategy(timeout=timedelta(minutes=2)) if world_size() > 1 else "auto",
        callbacks=[rollout, meter],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    ranks = gather_over_ranks(meter.bytes)
    return {
        "ranks": world_size(),
        "gather_for_rollout": gather,
        "denoising_steps": denoising_steps,
        "forward_passes": meter.passes / num_steps,
        "bytes": {kind: max(found[kind] for found in ranks) for kind in KINDS},
        "collectives": {
            part: {name: number / num_steps for name, number in sorted(counts.items())}
            for part, counts in meter.counts.items()
        },
    }


def in_processes(num: int, function: Callable[[], Any]) -> Any:
    """What a function gives on rank 0 of a group of forked processes."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for number in range(num):
            child = os.fork()
            if child == 0:
                os._exit(_in_rank(number, num, folder, function))
            children.append(child)
        if any(status for _, status in [os.waitpid(child, 0) for child in children]):
            raise RuntimeError(f"a process of {num} failed")
        return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _in_rank(number: int, num: int, folder: Path, function: Callable[[], Any]) -> int:
    try:
        if num > 1:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(num), GROUP_RANK="0")
            os.environ.update(TORCHELASTIC_RUN_ID="bench", MASTER_ADDR="", MASTER_PORT="")
            os.environ.update(LOCAL_WORLD_SIZE=str(num))
            store = dist.FileStore(str(folder / "store"), num)
            dist.init_process_group("gloo", store=store, rank=number, world_size=num)
        found = function()
        if number == 0:
            (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
        if num > 1:
            dist.barrier()
            dist.destroy_process_group()
    except Exception:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def counted_8b(num: int, denoising_steps: tuple[int, ...]) -> dict[str, Any]:
    """LLaDA-8B on rank 0 of many: bytes of its shards, and the collectives of a rollout and an update."""
    dist.init_process_group("fake", rank=0, world_size=num, store=FakeStore())
    optimizing = OptimizerConfig(master_weights=True)
    mesh = init_device_mesh("cpu", (num,))
    with FakeTensorMode():
        policy, reference = _sharded_8b(mesh, trained=True), _sharded_8b(mesh, trained=False)
        optimizer = build_optimizer(policy, optimizing)
        ids = torch.zeros(1, 64, dtype=torch.int64)
        rollouts = {}
        for gather in (True, False):
            for steps in denoising_steps:
                with Collectives() as collectives, torch.no_grad():
                    if gather:
                        with gathered(policy):
                            _passes(policy, ids, steps)
                    else:
                        _passes(policy, ids, steps)
                rollouts[f"gather_for_rollout {gather}, {steps} passes"] = dict(collectives.counts)
        with Collectives() as collectives:
            with torch.no_grad():
                _passes(reference, ids, 1)
            _passes(policy, ids, 1).sum().backward()
        update = dict(collectives.counts)
        clip_gradients(policy.parameters(), 1.0)
        optimizer.step()
        sizes = {
            "parameters": held(policy.parameters()),
            "gradients": held(p.grad for p in policy.parameters()),
            "optimizer": held(state_of(optimizer)),
            "reference": held(reference.parameters()),
        }
    dist.destroy_process_group()
    settings = PlanSettings(
        policy=policy_sizes(KNOWN),
        beta=0.01,
        dtype="bfloat16",
        master_weights=True,
        strategy="ShardedStrategy",
        num_gpus=num,
        prompts_per_step=num,
    )
    plan = plan_memory(settings)
    return {
        "ranks": num,
        "bytes": sizes,
        "planned": {kind: getattr(plan, kind) for kind in KINDS},
        "collectives": {"rollout": rollouts, "one micro-batch": update},
    }


def _sharded_8b(mesh: Any, *, trained: bool) -> DiffusionLM:
    family, config, _ = find_config(KNOWN)
    with default_dtype(torch.bfloat16):
        policy = family(config).train().requires_grad_(trained)
    policy.activation_checkpointing = True
    shard(policy, policy.units, mesh, None)
    return policy


def _passes(policy: DiffusionLM, ids: Tensor, number: int) -> Tensor:
    for _ in range(number):
        logits = policy.head(policy(ids))
    return logits


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Sharding: bytes on each rank, and collectives",
        "",
        "`python benchmarks/bench_scaling.py --write`, "
        f"torch {result['environment']['torch']}, commit {result['commit']}",
        "",
        "Bytes of the fullest rank as the optimizer steps. The tiny policy is measured over gloo (float32);",
        "LLaDA-8B (bfloat16, master weights) is counted on tensors without memory, in a fake process group.",
        "`plan` is what `drift plan` says of the same four.",
        "",
        "| policy | ranks | parameters | gradients | optimizer | reference | together | x ranks | plan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [("tiny", found) for found in result["measured"] if found["gather_for_rollout"]]
    rows = [row for row in rows if row[1]["denoising_steps"] == result["config"]["denoising_steps"][0]]
    for name, found in [*rows, *(("LLaDA-8B", found) for found in result["counted"])]:
        sizes, total = found["bytes"], sum(found["bytes"].values())
        planned = f"{sum(found['planned'].values()):,}" if "planned" in found else ""
        cells = [f"{sizes[kind]:,}" for kind in KINDS] + [
            f"{total:,}",
            f"{total * found['ranks']:,}",
            planned,
        ]
        lines.append(f"| {name} | {found['ranks']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Collectives of one step of the tiny policy (one micro-batch, KL to a reference), on rank 0:",
        "",
        "| ranks | model.gather_for_rollout | denoising steps | rollout | update |",
        "|---|---|---|---|---|",
    ]
    for found in result["measured"]:
        parts = [_listed(found["collectives"][part]) for part in ("rollout", "update")]
        gather = str(found["gather_for_rollout"]).lower()
        lines.append(f"| {found['ranks']} | {gather} | {found['denoising_steps']} | {' | '.join(parts)} |")
    lines += [
        "",
        "Collectives of LLaDA-8B, the same on 8 and 64 ranks:",
        "",
        "| what | collectives |",
        "|---|---|",
    ]
    collectives = result["counted"][0]["collectives"]
    lines += [f"| rollout, {name} | {_listed(counts)} |" for name, counts in collectives["rollout"].items()]
    lines.append(f"| one micro-batch, with reference | {_listed(collectives['one micro-batch'])} |")
    return "\n".join(lines) + "\n"


def _listed(counts: dict[str, float]) -> str:
    names = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
    return (
        ", ".join(f"{number:g} {names.get(name, name.strip('_'))}" for name, number in counts.items())
        or "none"
    )


def main() -> None:
    """Measures, checks what must hold, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--large", type=int, nargs="+", default=[8, 64], help="ranks of the 8B policy")
    parser.add_argument("--denoising_steps", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of the tiny policy, >= 2")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    options = parser.parse_args()
    found = [
        in_processes(num, partial(measured, gather, steps, options.steps))
        for num in options.ranks
        for gather in ((True, False) if num > 1 else (True,))
        for steps in options.denoising_steps
    ]
    large = [
        in_processes(1, partial(counted_8b, num, tuple(options.denoising_steps))) for num in options.large
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result = {
        "benchmark": "scaling",
        "measured": found,
        "counted": large,
        "config": {name: value for name, value in vars(options).items() if name != "write"},
        "environment": {"torch": torch.__version__},
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(result))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "scaling.md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
