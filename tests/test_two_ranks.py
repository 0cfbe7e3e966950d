"""The same global batch on one process and on two gives the same rollouts, metrics and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, sys
import torch
from lightning import Trainer, seed_everything
from drift.callbacks import RolloutCallback
from drift.data import PromptDataModule
from drift.losses import LossConfig
from drift.models import LoRAConfig
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig
from drift.samplers import FullSampler, WeightedSampler
from drift.tasks import SudokuTask

settings = json.loads(sys.argv[1])
sampler = FullSampler() if settings["full"] else WeightedSampler(k=2)
seed_everything(0)
module = RLDFModule(
    "sudoku_base",
    sampler=sampler,
    loss=LossConfig(
        beta=settings["beta"],
        normalisation=settings["normalisation"],
        importance_cap=settings["importance_cap"],
    ),
    optimizer=OptimizerConfig(lr=1e-4),
    train_groups=settings["train_groups"],
    micro_batch_size=settings["micro_batch_size"],
    num_updates=settings["num_updates"],
    lora=LoRAConfig(rank=4, alpha=8, targets=settings["lora"]) if settings["lora"] else None,
    activation_checkpointing=bool(settings["lora"]),
)
data = PromptDataModule(SudokuTask(), prompts_per_step=4, num_validation=settings["num_validation"])
decode = DenoiseConfig(
    block_length=settings["block_length"], temperature=1.0, use_cache=settings["importance_cap"] is not None
)
greedy = DenoiseConfig(block_length=16)
trainer = Trainer(
    max_steps=2,
    accelerator="cpu",
    devices=settings["devices"],
    strategy="ddp" if settings["devices"] > 1 else "auto",
    callbacks=[RolloutCallback(group_size=4, completion_length=16, decode=decode, evaluation=greedy)],
    val_check_interval=2,
    check_val_every_n_epoch=None,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    use_distributed_sampler=False,
)
trainer.fit(module, data)
if trainer.is_global_zero:
    metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if "seconds" not in name}
    torch.save({"weights": module.policy.state_dict(), "metrics": metrics}, settings["path"])
"""


def trained(path: Path, **settings: object) -> dict[str, dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = path.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    call = [sys.executable, str(script), json.dumps({"path": str(path), **settings})]
    subprocess.run(call, check=True, env=environment, cwd=path.parent, timeout=300, capture_output=True)
    return torch.load(path, weights_only=True)


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    "settings",
    [
        # Few of the groups of an untrained policy have spread, so a rank may be without any noisy state.
        {"beta": 0.0, "normalisation": "token", "full": True, "micro_batch_size": 6},
        {"beta": 0.04, "normalisation": "sample", "full": False, "micro_batch_size": 64},
        # The best group is on one rank only, and so is the one validation puzzle.
        {
            "beta": 0.04,
            "normalisation": "token",
            "full": False,
            "micro_batch_size": 5,
            "train_groups": 1,
            "num_validation": 1,
        },
        # Adapters on few of the layers, recomputed blocks, and the KL to the policy without adapters.
        {
            "beta": 0.04,
            "normalisation": "token",
            "full": False,
            "micro_batch_size": 5,
            "num_updates": 2,
            "lora": ["q_proj", "ff_out"],
        },
        # The mismatch of cached rollouts is weighed, and the largest of all is on one of the ranks.
        {
            "beta": 0.04,
            "normalisation": "token",
            "full": False,
            "micro_batch_size": 7,
            "importance_cap": 1.5,
            "block_length": 8,
        },
    ],
    ids=[
        "token, full, small micro-batches",
        "sample, weighted, with KL",
        "one group, one puzzle",
        "adapters",
        "cached, weighed",
    ],
)
def test_two_processes_do_what_one_does(tmp_path, settings):
    plain = {"train_groups": None, "num_validation": 5, "num_updates": 1, "lora": None}
    settings = plain | {"importance_cap": None, "block_length": 16} | settings
    one = trained(tmp_path / "one.pt", devices=1, **settings)
    two = trained(tmp_path / "two.pt", devices=2, **settings)
    assert one["metrics"].keys() == two["metrics"].keys()
    assert ("mismatch/weight" in one["metrics"]) == (settings["importance_cap"] is not None)
    assert (one["metrics"]["mismatch/max_ratio"] > 1.01) == (settings["importance_cap"] is not None)
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, value in one["weights"].items():
        # float32 sums in another order, through two AdamW steps of 1e-4.
        torch.testing.assert_close(two["weights"][name], value, rtol=0, atol=2e-6, msg=name)


EVALUATED = """
import json, sys
from lightning import Trainer
from drift.callbacks import AnswerCallback, RolloutCallback, SummaryCallback
from drift.data import Benchmark, PromptDataModule
from drift.evaluation import GridConfig
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

settings = json.loads(sys.argv[1])
warm = DenoiseConfig(block_length=8, temperature=1.0, threshold=0.5)
grid = GridConfig(lengths=[8, 16], decodes={"warm": warm}, samples=3)
files = SummaryCallback(settings["path"]), AnswerCallback(settings["path"] + "l")
rollout = RolloutCallback(completion_length=16, decode=warm, evaluation=warm, test=grid)
# Of the second set one rank has nothing.
sets = {"many": Benchmark(limit=5), "one": Benchmark(task=SudokuTask(blanks=(3, 4)), limit=1)}
trainer = Trainer(
    accelerator="cpu",
    devices=settings["devices"],
    strategy="ddp" if settings["devices"] > 1 else "auto",
    callbacks=[rollout, *files],
    logger=False,
    enable_progress_bar=False,
    use_distributed_sampler=False,
)
module = RLDFModule("sudoku_base")
data = PromptDataModule(SudokuTask(), test=sets, evaluation_batch_size=settings["batch_size"])
trainer.test(module, data, verbose=False)
"""


def evaluated(path: Path, **settings: object) -> tuple[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = path.with_suffix(".py")
    script.write_text(EVALUATED, encoding="utf-8")
    call = [sys.executable, str(script), json.dumps({"path": str(path), **settings})]
    subprocess.run(call, check=True, env=environment, cwd=path.parent, timeout=300, capture_output=True)
    found = json.loads(path.read_text())
    assert all(result.pop("seconds") > 0 for result in found["results"])
    return json.dumps(found), path.with_suffix(".jsonl").read_text()


@pytest.mark.two_ranks
def test_two_processes_measure_what_one_does(tmp_path):
    one = evaluated(tmp_path / "one.json", devices=1, batch_size=64)
    two = evaluated(tmp_path / "two.json", devices=2, batch_size=2)
    assert two == one
    results = json.loads(one[0])["results"]
    assert [result["num"] for result in results] == [5, 5, 1, 1]
    assert len(one[1].splitlines()) == (5 + 1) * 2 * 3
    assert not list(tmp_path.glob(".*"))


SHARDED = """
import copy
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from drift.optimizer import OptimizerConfig, build_optimizer

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))

def make():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)).bfloat16()
    fully_shard(module, mesh=mesh)
    return module, build_optimizer(module, OptimizerConfig(lr=1e-5, master_weights=True))

def train(module, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

whole, optimizer = make()
train(whole, optimizer, range(3))
other, resumed = make()
other.load_state_dict(whole.state_dict())
set_optimizer_state_dict(other, resumed, copy.deepcopy(get_optimizer_state_dict(whole, optimizer)))
train(whole, optimizer, range(3, 6))
train(other, resumed, range(3, 6))
for p, q in zip(whole.parameters(), other.parameters(), strict=True):
    assert optimizer.state[p]["master"].to_local().numel() * 2 == p.numel()
    assert optimizer.state[p]["master"].dtype == torch.float32
    assert torch.equal(p.to_local(), q.to_local())
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[p][name].to_local(), resumed.state[q][name].to_local()), name
dist.destroy_process_group()
"""


@pytest.mark.two_ranks
def test_master_weights_are_sharded_and_resumed_with_the_parameters(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(call, env=environment, cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
