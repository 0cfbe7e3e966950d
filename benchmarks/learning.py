"""Runs that learn: the tasks, the recipes, and one run with its curve. `bench_learning` compares them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from drift import samplers
from drift.callbacks import RolloutCallback
from drift.data import PromptDataModule
from drift.evaluation import GridConfig
from drift.losses import LossConfig
from drift.models import resolve_folder
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig
from drift.samplers import TimestepSampler
from drift.sft import SFTModule
from drift.tasks import CountdownTask, SudokuTask, Task

NUM_VALIDATION, NUM_TEST = 512, 2048
# Evaluation draws nothing: its puzzles are those of a seed that no run trains on.
_TEST_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A task, and the policy that starts on it.

    Args:
        task: makes the task under a seed.
        length: positions of a completion, one block.
        base_steps: steps of fine-tuning on demonstrations that make the base policy; 0: a shipped policy.
        policy: the shipped policy, or the one whose shape and tokenizer the base has.
        prompts: of a step.
    """

    task: type[Task]
    settings: Mapping[str, Any]
    length: int = 16
    base_steps: int = 0
    policy: str = "sudoku_base"
    prompts: int = 64

    def make(self, seed: int) -> Any:
        """The task under a seed."""
        return self.task(seed=seed, **self.settings)


SUBJECTS = {
    "quickstart": Subject(task=SudokuTask, settings={"blanks": (6, 9)}, prompts=16),
    "sudoku": Subject(task=SudokuTask, settings={"blanks": (8, 12)}, base_steps=550),
    "countdown": Subject(
        task=CountdownTask,
        settings={"num_numbers": 3, "max_number": 9, "max_target": 50, "prompt": "{numbers} = {target}"},
        base_steps=3000,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs between runs on a subject: the estimator, the likelihood, and how rollouts are made.

    Args:
        sampler: class in drift.samplers.
        arguments: of the sampler.
        loss: settings that differ from those of the paper, whose KL is left out.
        decode: rollout settings that differ from threshold 0.9 at temperature 1.
        optimizer: settings that differ from those of the paper.
        num_updates: of each rollout.
        group: completions of a prompt.
    """

    sampler: str = "WeightedSampler"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    decode: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    num_updates: int = 1
    group: int = 8

    def make_sampler(self) -> TimestepSampler:
        """The timestep sampler."""
        return getattr(samplers, self.sampler)(**self.arguments)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Args:
        subject: name of the subject.
        recipe: name of the recipe.
        lr: learning rate.
        seed: of prompts, rollouts and plans.
        budget: passes of rows through the policy; a noisy state that is learned from counts three.
    """

    subject: str
    recipe: str
    lr: float
    seed: int
    budget: float


class Curve(Callback):
    """Keeps what came out along the way, and ends training where the budget is spent."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.points: list[dict[str, float]] = []
        self.seconds = self.passes = self._start = 0.0
        self._recent: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock."""
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
        if self.passes >= self.run.budget:
            trainer.should_stop = True
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stops the clock."""
        if self._start:
            self.seconds += time.perf_counter() - self._start

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Adds a point."""
        recent = self._recent[-10:] or [(float("nan"), float("nan"))]
        reward, timesteps = (sum(values) / len(recent) for values in zip(*recent, strict=True))
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
    policy = folder / name
    if not (policy / "config.json").exists():
        seed_everything(0)
        optimizer = OptimizerConfig(lr=2e-3, schedule="linear")
        module = SFTModule(subject.policy, optimizer=optimizer, random_init=True)
        data = PromptDataModule(subject.make(0), prompts_per_step=64, demonstration_length=subject.length)
        trainer = _trainer(subject.base_steps, device, [_rollout(subject, Recipe(), 0)], evaluate=0)
        trainer.fit(module, data)
        module.policy.save_pretrained(policy)
        for part in ("tokenizer.json", "tokenizer_config.json"):
            (policy / part).write_bytes((resolve_folder(subject.policy) / part).read_bytes())
    return str(policy)


def learn(run: Run, recipe: Recipe, bases: Path, device: str, evaluate: int = 10) -> dict[str, Any]:
    """What a run comes to: its curve, and its accuracies on prompts that nothing was chosen by.

    Args:
        run: what to run.
        recipe: the run's recipe.
        bases: folder of base policies.
        device: Lightning's accelerator.
        evaluate: steps between two points of the curve.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    subject = SUBJECTS[run.subject]
    policy = base_policy(run.subject, bases, device)
    seed_everything(run.seed)
    loss = LossConfig(**{"tau": 0.6, "beta": 0.0, **recipe.loss})
    module = RLDFModule(
        policy,
        sampler=recipe.make_sampler(),
        loss=loss,
        optimizer=OptimizerConfig(**{"lr": run.lr, **recipe.optimizer}),
        num_updates=recipe.num_updates,
        micro_batch_size=4096,
    )
    curve, rollout = Curve(run), _rollout(subject, recipe, run.seed)
    trainer = _trainer(100_000, device, [rollout, curve], evaluate)
    data = _data(subject, run.seed)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    steps = trainer.global_step
    # Puzzles of another seed, and of another split than those that settings were chosen by.
    fresh = _data(subject, _TEST_SEED + run.seed)
    trainer.test(module, fresh, verbose=False)
    final = accuracies(module)
    base = RLDFModule(policy, loss=loss)
    trainer.test(base, fresh, verbose=False)
    counts = {"seconds": curve.seconds, "passes": curve.passes, "steps": steps}
    return {
        **vars(run),
        "settings": asdict(recipe),
        **counts,
        "base": accuracies(base),
        "final": final,
        "curve": curve.points,
    }


def _data(subject: Subject, seed: int) -> PromptDataModule:
    return PromptDataModule(
        subject.make(seed),
        prompts_per_step=subject.prompts,
        num_validation=NUM_VALIDATION,
        num_test=NUM_TEST,
        evaluation_batch_size=NUM_TEST,
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


def _trainer(steps: int, device: str, callbacks: list[Callback], evaluate: int) -> Trainer:
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
        val_check_interval=evaluate or None,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
