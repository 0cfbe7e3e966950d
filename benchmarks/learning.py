"""A run that learns, with its curve. `bench_learning` compares them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from recipes import EMA_DECAY, Recipe
from subjects import SUBJECTS, Subject
from torch import Tensor

from drift.callbacks import RolloutCallback
from drift.data import PromptDataModule
from drift.evaluation import GridConfig
from drift.losses import LossConfig
from drift.models import resolve_folder
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig
from drift.sft import SFTModule

_NEVER = 10**9
# Evaluation draws nothing: its puzzles are those of a seed that no run trains on.
_TEST_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Args:
        subject: name of the subject.
        recipe: name of the recipe.
        lr: learning rate.
        seed: of prompts, rollouts and plans.
        budgets: passes of rows through the policy after which the run is looked at, in growing order; it ends
            at the last. A noisy state that is learned from counts three.
        fresh: measure it on fresh prompts too, not only in validation.
    """

    subject: str
    recipe: str
    lr: float
    seed: int
    budgets: Sequence[float]
    fresh: bool = True


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A run where it has spent one of its budgets: its weights, and their average."""

    budget: float
    seconds: float
    passes: float
    steps: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]


class Curve(Callback):
    """Keeps what came out along the way, marks where budgets are spent, and ends training at the last."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.points: list[dict[str, float]] = []
        self.marks: list[Mark] = []
        self.seconds = self.passes = self._start = 0.0
        self._recent: list[tuple[float, float]] = []
        self._num_due = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock."""
        trainer.val_check_batch = _NEVER
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts seconds and passes."""
        self.seconds += time.perf_counter() - self._start
        figures = trainer.callback_metrics
        states = float(figures["update/noisy_states"])
        rolled_out = 0 if batch.rollout is None else int(batch.rollout.num_timesteps.sum())
        # Those of whole completions look at all states once more before any gradient.
        self.passes += rolled_out + (4 if pl_module.sampler.__module__.endswith(".sequence") else 3) * states
        self._recent.append((float(figures["reward/mean"]), float(figures["rollout/timesteps"])))
        while len(self.marks) < len(self.run.budgets) and self.passes >= self.run.budgets[len(self.marks)]:
            self._mark(trainer.global_step, pl_module)
        trainer.should_stop = len(self.marks) == len(self.run.budgets)
        points = self.passes // SUBJECTS[self.run.subject].point_passes
        # Lightning asks by number of batches.
        trainer.val_check_batch = 1 if points > self._num_due else _NEVER
        self._num_due = points
        self._start = time.perf_counter()

    def _mark(self, step: int, module: Any) -> None:
        counts = {"seconds": self.seconds, "passes": self.passes}
        weights = {name: weight.clone() for name, weight in module.policy.state_dict().items()}
        module.show_average()
        average = {name: weight.clone() for name, weight in module.policy.state_dict().items()}
        module.hide_average()
        budget = self.run.budgets[len(self.marks)]
        self.marks.append(Mark(budget=budget, steps=step, weights=weights, average=average, **counts))

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stops the clock."""
        if self._start:
            self.seconds += time.perf_counter() - self._start

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Adds a point."""
        recent = self._recent[-10:]
        reward, timesteps = (
            (sum(values) / len(recent) for values in zip(*recent, strict=True)) if recent else (None, None)
        )
        point = {"step": trainer.global_step, "seconds": self.seconds, "passes": self.passes}
        point |= {"reward": reward, "rollout": timesteps, **accuracies(pl_module)}
        if not self.points or self.points[-1]["step"] < point["step"]:
            self.points.append(point)
        self._start = time.perf_counter() if trainer.state.fn == TrainerFn.FITTING else 0.0


def accuracies(module: Any) -> dict[str, float]:
    """Accuracy and timesteps with the threshold, and accuracy one token at a time, of the last evaluation."""
    found = {module.cells[cell].name: result.figures() for (_, cell), result in module.results.items()}
    named = {"accuracy": ("threshold", "accuracy"), "timesteps": ("threshold", "timesteps")}
    named |= {"one by one": ("one by one", "accuracy")}
    return {name: float(found[cell][figure]) for name, (cell, figure) in named.items()}


def base_policy(name: str, folder: Path, device: str) -> str:
    """The policy that a subject starts from, made once in `folder` by fine-tuning on demonstrations."""
    subject = SUBJECTS[name]
    if not subject.base_steps:
        return subject.policy
    policy = folder / f"{name}_{subject.digest}"
    if not (policy / "config.json").exists():
        seed_everything(0)
        optimizer = OptimizerConfig(lr=2e-3, schedule="linear")
        module = SFTModule(subject.policy, optimizer=optimizer, random_init=True)
        data = PromptDataModule(subject.make(0), prompts_per_step=64, demonstration_length=subject.length)
        trainer = _trainer(subject.base_steps, device, [_rollout(subject, Recipe(), 0)], evaluate=False)
        trainer.fit(module, data)
        module.policy.save_pretrained(policy)
        for part in ("tokenizer.json", "tokenizer_config.json"):
            (policy / part).write_bytes((resolve_folder(subject.policy) / part).read_bytes())
    return str(policy)


def learn(run: Run, recipe: Recipe, bases: Path, device: str) -> list[dict[str, Any]]:
    """What a run comes to at each of its budgets: its curve, and accuracies on fresh prompts.

    Points of the curve, and `final`, are of the average of the weights; `last` is of the weights themselves.

    Args:
        run: what to run.
        recipe: the run's recipe.
        bases: folder of base policies.
        device: Lightning's accelerator.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    subject = SUBJECTS[run.subject]
    policy = base_policy(run.subject, bases, device)
    seed_everything(run.seed)
    module = RLDFModule(
        policy,
        sampler=recipe.make_sampler(),
        loss=LossConfig(**{"tau": 0.6, "beta": 0.0, **recipe.loss}),
        optimizer=OptimizerConfig(**{"lr": run.lr, "ema_decay": EMA_DECAY, **recipe.optimizer}),
        num_updates=recipe.num_updates,
        micro_batch_size=4096,
    )
    curve, rollout = Curve(run), _rollout(subject, recipe, run.seed)
    trainer = _trainer(100_000, device, [rollout, curve], evaluate=True)
    data = _data(subject, run.seed)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    results = []
    for mark in curve.marks:
        result = {**vars(run), "settings": asdict(recipe), "task": subject.description()}
        del result["budgets"], result["fresh"]
        result |= {name: getattr(mark, name) for name in ("budget", "seconds", "passes", "steps")}
        if run.fresh:
            result["base"] = _base(run, bases, device)
            for name, weights in (("last", mark.weights), ("final", mark.average)):
                module.policy.load_state_dict(weights)
                result[name] = _fresh(trainer, module, run)
        results.append({**result, "curve": [point for point in curve.points if point["step"] <= mark.steps]})
    return results


def _fresh(trainer: Trainer, module: RLDFModule, run: Run) -> dict[str, float]:
    """Accuracies on prompts of another split and seed than those that settings were chosen by."""
    trainer.test(module, _data(SUBJECTS[run.subject], _TEST_SEED + run.seed), verbose=False)
    return accuracies(module)


def _base(run: Run, bases: Path, device: str) -> dict[str, float]:
    """Accuracies of the base policy on a seed's fresh prompts, measured once."""
    subject = SUBJECTS[run.subject]
    kept = bases / f"{run.subject}_{subject.digest}_{run.seed}.json"
    if not kept.exists():
        base = RLDFModule(base_policy(run.subject, bases, device))
        trainer = _trainer(1, device, [_rollout(subject, Recipe(), run.seed)], evaluate=False)
        bases.mkdir(parents=True, exist_ok=True)
        # Another run of the same seed may be measuring it, too.
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_fresh(trainer, base, run)), encoding="utf-8")
        partial.replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def _data(subject: Subject, seed: int) -> PromptDataModule:
    return PromptDataModule(
        subject.make(seed),
        prompts_per_step=subject.prompts,
        num_validation=subject.num_validation,
        num_test=subject.num_test,
        evaluation_batch_size=subject.num_test,
    )


def _rollout(subject: Subject, recipe: Recipe, seed: int) -> RolloutCallback:
    plain = DenoiseConfig(block_length=subject.length, threshold=0.9)
    grid = GridConfig(
        decodes={
            "threshold": plain,
            "one by one": replace(plain, threshold=None, steps=subject.length),
        }
    )
    decode = replace(plain, **{"temperature": 1.0, **recipe.decode})
    rollout = RolloutCallback(
        group_size=recipe.group,
        completion_length=subject.length,
        decode=decode,
        evaluation=plain,
        test=grid,
        seed=seed,
    )
    # Validation measures both, too.
    rollout.cells = dict.fromkeys(rollout.cells, rollout.cells["test"])
    return rollout


def _trainer(steps: int, device: str, callbacks: list[Callback], evaluate: bool) -> Trainer:
    return Trainer(
        accelerator=device,
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if evaluate else 0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
