"""Runs jobs in groups of processes that talk over gloo, and keeps what they found: `python ranks.py FOLDER`.

Everything is imported once, in a parent that then forks every group: most of a small run is its imports.
FOLDER/jobs.json holds a list of jobs, each a name, a number of ranks, the name of a function below and its
arguments; what the function gives on rank 0 goes to FOLDER/NAME.pt.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import ExitStack
from copy import deepcopy
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning import Callback, Trainer, seed_everything
from torch.distributed.device_mesh import init_device_mesh

from drift.averaging import averages
from drift.callbacks import RolloutCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule
from drift.distributed import (
    Collectives,
    gather_over_ranks,
    gathered,
    joined,
    rank,
    require_agreement,
    shard,
    whole,
    world_size,
)
from drift.logprobs import token_logprobs
from drift.losses import LossConfig
from drift.masking import masked_batch
from drift.micro_batches import by_length, micro_batches
from drift.models import LLaDA, LLaDAConfig, LoRAConfig, merged_state_dict
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig, build_optimizer, clip_gradients
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig, denoise
from drift.samplers import CoupledElboSampler, FullSampler, WeightedSampler
from drift.sft import SFTModule, mask_demonstrations
from drift.strategy import ShardedStrategy
from drift.tasks import SudokuTask

TIMEOUT = timedelta(seconds=60)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
KEPT = ("completion_ids", "step_map", "token_probs", "commit_kind", "rewards", "advantages", "trained")


class SpreadReward(PerSampleReward):
    """Differs for nearly every completion, so that every group has something to learn."""

    def score(self, completion, problem):
        return sum(place * ord(letter) for place, letter in enumerate(completion, start=1)) % 97 / 97


class RareReward(SpreadReward):
    """The same for some prompts; all completions of the others are alike."""

    def score(self, completion, problem):
        return super().score(completion, problem) if sum(map(ord, problem.prompt)) % 2 else 0.5


class RaggedTask(SudokuTask):
    """Sudoku whose prompts have different lengths."""

    def problem(self, row):
        problem = super().problem(row)
        problem.prompt = problem.prompt[: 4 + sum(map(ord, problem.prompt)) % 12]
        return problem


class Losses(Callback):
    """The loss of every step, and into how many groups of about the same length each rank's rows fall."""

    def __init__(self):
        self.values, self.groups = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics["loss/total"]))
        states, _ = mask_demonstrations(batch, 1, 0)
        self.groups.append(gather_over_ranks(len(by_length(states))))


class Saver(Callback):
    """Writes a checkpoint as training ends."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


class Probe(Callback):
    """Keeps what the policy gives in validation, and its weights and their average after it; by rank."""

    def __init__(self):
        self.ids = torch.arange(2, 42)[None]
        self.found = {}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        with torch.no_grad():
            self.found["logits"] = pl_module.policy.logits(self.ids)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if "logits" in self.found and "weights" not in self.found:
            kept = averages(trainer.optimizers[0])
            named = list(pl_module.policy.named_parameters())
            self.found["weights"] = {name: whole(p.detach()).clone() for name, p in named}
            self.found["averages"] = {name: whole(kept[p]).clone() for name, p in named}


class Recorder(Callback):
    """Keeps rollouts, plans and metrics of every step, of all ranks."""

    def __init__(self):
        self.steps, self.plan, self.passes = [], {}, []

    def watch(self, module):
        make = module.sampler.plan

        def plan(rollout, generator=None):
            found = make(rollout, generator)
            self.plan = {
                "masked": found.masked.sum(dim=0),
                "current": found.current.sum(dim=0),
                "weight": found.weight.sum(dim=0),
            }
            return found

        module.sampler.plan = plan

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found = {name: getattr(pl_module.learned, name) for name in KEPT}
        found = {name: value for name, value in (found | self.plan).items() if value is not None}
        if "trained" in found:  # what fills up a rank's share lies elsewhere on each number of ranks
            found = {name: value[found["trained"]] for name, value in found.items()}
        ranks = gather_over_ranks(found)
        step = {name: torch.cat([one[name] for one in ranks]) for name in found}
        figures = trainer.callback_metrics
        step["metrics"] = {name: float(v) for name, v in figures.items() if "seconds" not in name}
        self.steps.append(step)
        self.passes.append(gather_over_ranks(pl_module.learned.num_forwards))


def train(
    strategy="auto",
    max_steps=5,
    beta=0.04,
    normalisation="token",
    importance_cap=None,
    tau=0.6,
    full=False,
    elbo=False,
    lora=None,
    checkpointing=False,
    num_updates=1,
    train_groups=None,
    refill_rounds=0,
    micro_batch_size=5,
    num_validation=5,
    block_length=16,
    commit=None,
    gather=True,
    dtype="float32",
    precision="32-true",
    master_weights=False,
    ema_decay=0.0,
    lr=1e-5,
    probe=False,
    save=None,
    resume=None,
    export=None,
):
    """A few steps of training, recorded; `save` and `resume` are paths of checkpoints."""
    seed_everything(0, verbose=False)
    module = RLDFModule(
        "sudoku_base",
        sampler=CoupledElboSampler() if elbo else FullSampler() if full else WeightedSampler(k=2),
        loss=LossConfig(tau=tau, beta=beta, normalisation=normalisation, importance_cap=importance_cap),
        optimizer=OptimizerConfig(
            lr=lr, weight_decay=0.01, master_weights=master_weights, ema_decay=ema_decay
        ),
        train_groups=train_groups,
        micro_batch_size=micro_batch_size,
        num_updates=num_updates,
        dtype=dtype,
        lora=LoRAConfig(rank=4, alpha=8, targets=lora) if lora else None,
        activation_checkpointing=checkpointing,
        gather_for_rollout=gather,
    )
    task = RaggedTask()
    task.reward = RareReward() if refill_rounds else SpreadReward()
    data = PromptDataModule(task, prompts_per_step=4, num_validation=num_validation, evaluation_batch_size=1)
    decode = DenoiseConfig(
        block_length=block_length,
        temperature=1.0,
        use_cache=importance_cap is not None or commit is not None,
        threshold=0.7,
        commit=commit,
        # Wide: a narrow one makes much of the last digits of a probability.
        width=0.2,
    )
    rollout = RolloutCallback(
        group_size=4,
        completion_length=16,
        decode=decode,
        evaluation=DenoiseConfig(block_length=16),
        refill_rounds=refill_rounds,
    )
    recorder, probe_ = Recorder(), Probe()
    recorder.watch(module)
    trainer = Trainer(
        max_steps=max_steps,
        devices=world_size(),
        **QUIET,
        precision=precision,
        strategy=ShardedStrategy(timeout=TIMEOUT) if strategy == "fsdp" else strategy,
        callbacks=[rollout, recorder, *([Saver(save)] if save else []), *([probe_] if probe else [])],
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    held = {
        "policy": list(module.policy.parameters()),
        "reference": [] if module.reference is None else list(module.reference.parameters()),
        "optimizer": [v for s in trainer.optimizers[0].state.values() for v in s.values() if v.dim()],
    }
    return {
        "steps": recorder.steps,
        "passes": recorder.passes,
        "bytes": {name: sum(map(local_bytes, tensors)) for name, tensors in held.items()},
        "weights": {name: value.clone() for name, value in merged_state_dict(module.policy).items()},
        "probe": probe_.found,
    }


def fine_tune(strategy="auto"):
    """Losses and weights of fine-tuning on prompts of unlike lengths, which ranks split differently."""
    seed_everything(0, verbose=False)
    module = SFTModule("sudoku_base", OptimizerConfig(lr=1e-4))
    data = PromptDataModule(RaggedTask(), prompts_per_step=8, demonstration_length=16)
    recorder = Losses()
    trainer = Trainer(
        max_steps=3,
        devices=world_size(),
        **QUIET,
        strategy=ShardedStrategy(timeout=TIMEOUT) if strategy == "fsdp" else strategy,
        callbacks=[recorder],
        limit_val_batches=0,
    )
    with patch("drift.micro_batches._LEAST_POSITIONS", 1):
        trainer.fit(module, data)
    weights = {name: value.clone() for name, value in merged_state_dict(module.policy).items()}
    return {"losses": recorder.values, "groups": recorder.groups, "weights": weights}


def local_bytes(tensor):
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def tiny(seed=0, **changes):
    settings = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "mlp_hidden_size": 64,
        "vocab_size": 50,
        "max_sequence_length": 128,
        "mask_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "init_std": 0.5,
    }
    torch.manual_seed(seed)
    return LLaDA(LLaDAConfig(**settings | changes))


def sharded(policy, dtype=None):
    shard(policy, policy.units, init_device_mesh("cpu", (world_size(),)), dtype)
    return policy


def prompts(num=2):
    ids = torch.randint(2, 50, (num, 6), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def own_pace():
    """Rollouts of as many passes as each rank likes: what they give, the passes made, the collectives."""
    found = {}
    steps = 2 + 3 * rank()
    config = DenoiseConfig(block_length=16, threshold=None, steps=steps, temperature=1.0)
    decode = partial(denoise, prompt_ids=prompts()[0], prompt_mask=prompts()[1], completion_length=16)
    alone = decode(tiny().eval(), config=config, seeds=torch.arange(2))
    for way in ("gathered", "joined"):
        policy = sharded(tiny()).eval()
        passes = []
        policy.register_forward_hook(lambda *_, passes=passes: passes.append(1))

        def spare(policy=policy):
            policy.head(policy(torch.full((1, 1), 1)))

        with ExitStack() as stack:
            counted = stack.enter_context(Collectives())
            stack.enter_context(torch.no_grad())
            ranks = gathered(policy) if way == "gathered" else joined(policy, spare, torch.device("cpu"))
            stack.enter_context(ranks)
            rollout = decode(policy, config=config, seeds=torch.arange(2))
        again = all(p.to_local().numel() < p.numel() for p in policy.parameters())
        same = torch.equal(rollout.completion_ids, alone.completion_ids)
        mine = (same, again, len(passes), rollout.num_forwards, dict(counted.counts))
        found[way] = gather_over_ranks(mine)
    return found


def tied(dtype=None):
    """A policy whose head is its embedding, and the same sharded: losses, gradients, and what stays tied."""
    found = {}
    ids, mask = prompts()
    config = DenoiseConfig(block_length=8, threshold=None, steps=4, temperature=1.0)
    rollout = denoise(tiny(weight_tying=True), ids, mask, 8, config, seeds=torch.arange(2))
    rollout.advantages = torch.ones(2)
    for name in ("whole", "sharded"):
        policy = tiny(weight_tying=True)
        policy.tie_weights()
        if name == "sharded":
            sharded(policy, None if dtype is None else getattr(torch, dtype))
        losses = []
        for _ in range(2):  # a second pass finds everything released
            noisy = masked_batch(rollout, FullSampler().plan(rollout), policy.mask_token_id)
            loss = -token_logprobs(policy, noisy).logp.sum()
            loss.backward()
            losses.append(loss.detach())
        norm = clip_gradients(policy.parameters(), 1.0)
        grads = {
            n: p.grad.full_tensor() if name == "sharded" else p.grad for n, p in policy.named_parameters()
        }
        tie = policy.head.weight is policy.get_input_embeddings().weight
        found[name] = {"losses": losses, "norm": norm, "grads": grads, "tie": tie}
    return found


def masters():
    """Master weights of sharded parameters: their sizes; an interrupted run beside one that wasn't."""

    def make():
        policy = sharded(tiny().bfloat16())
        return policy, build_optimizer(policy, OptimizerConfig(lr=1e-5, master_weights=True))

    def steps(policy, optimizer, which):
        for step in which:
            ids = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank()))
            policy.logits(ids).float().logsumexp(-1).square().mean().backward()
            clip_gradients(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    policy, optimizer = make()
    steps(policy, optimizer, range(3))
    other, resumed = make()
    other.load_state_dict(policy.state_dict())
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    steps(policy, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    same, sizes = [], []
    for p, q in zip(policy.parameters(), other.parameters(), strict=True):
        same.append(torch.equal(p.to_local(), q.to_local()))
        for name in ("master", "exp_avg", "exp_avg_sq"):
            mine, theirs = optimizer.state[p][name], resumed.state[q][name]
            same.append(torch.equal(mine.to_local(), theirs.to_local()))
            sizes.append((str(mine.dtype), mine.to_local().shape == p.to_local().shape))
    return {"same": all(gather_over_ranks(all(same))), "sizes": sorted(set(sizes))}


def disagree():
    """What each rank says of things that must be the same and are not."""
    said = {}
    cases = {
        "equal": ("the number of rows", {"train": 7}),
        "number": ("a thing", 3 + rank()),
        "settings": ("the settings", {"lr": 0.1 * (1 + rank()), "seed": 0}),
    }
    for case, (name, value) in cases.items():
        try:
            require_agreement(name, value)
            message = None
        except ConfigError as error:
            message = str(error)
        said[case] = gather_over_ranks(message)
    return said


def disagree_in_training(what):
    """The error of every rank where one of them is about to make other passes than the rest."""

    def fewer(*arguments):
        parts = micro_batches(*arguments)
        return parts[: len(parts) - rank()]

    seed_everything(0, verbose=False)
    module = RLDFModule("sudoku_base", micro_batch_size=3)
    task = RaggedTask()
    task.reward = SpreadReward()
    rows = 5 + rank() if what == "rows" else 5
    data = PromptDataModule(task, prompts_per_step=4, num_validation=rows)
    decode = DenoiseConfig(block_length=16, temperature=1.0, threshold=0.7)
    rollout = RolloutCallback(group_size=4, completion_length=16, decode=decode, evaluation=decode)
    trainer = Trainer(
        max_steps=1,
        devices=world_size(),
        **QUIET,
        strategy=ShardedStrategy(timeout=TIMEOUT),
        callbacks=[rollout],
        limit_val_batches=0,
    )
    try:
        with patch("drift.module.micro_batches", fewer if what == "micro-batches" else micro_batches):
            trainer.fit(module, data)
        message = "no error"
    except ConfigError as error:
        message = str(error)
    return gather_over_ranks(message)


JOBS: dict[str, Any] = {
    job.__name__: job for job in (train, fine_tune, own_pace, tied, masters, disagree, disagree_in_training)
}


def run(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Runs the jobs of one group, in this process: one of its ranks."""
    for job in jobs:
        if rank() == 0:
            sys.stdout.write(f"--- {job['name']}\n")
            sys.stdout.flush()
        found = JOBS[job["job"]](**job["arguments"])
        if rank() == 0:
            torch.save(found, folder / f"{job['name']}.pt")


def in_rank(number: int, num: int, folder: Path, jobs: list[dict[str, Any]]) -> int:
    """The exit status of one forked rank."""
    try:
        if num > 1:
            # As torchrun would start it.
            local = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
            os.environ.update({name: str(value) for name, value in local.items()})
            os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="tests", MASTER_ADDR="", MASTER_PORT="")
            store = dist.FileStore(str(folder / f"store_{num}"), num)
            dist.init_process_group("gloo", store=store, rank=number, world_size=num, timeout=TIMEOUT)
        run(folder, jobs)
        if num > 1:
            # Whoever leaves first must not take the connection from under the others.
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(folder: Path) -> int:
    """Forks one group after the other; the exit status."""
    jobs = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    for num, group in groupby(jobs, key=lambda job: job["ranks"]):
        several, children = list(group), []
        for number in range(num):
            child = os.fork()
            if child == 0:
                status = in_rank(number, num, folder, several)
                sys.stdout.flush()
                os._exit(status)
            children.append(child)
        if any(status for _, status in [os.waitpid(child, 0) for child in children]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
