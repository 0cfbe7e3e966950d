"""Performs rollouts: generates completions, has them judged, and attaches both to the batch."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer

from drift.contract import ConfigError, PromptBatch
from drift.policy_module import PolicyModule
from drift.rollout import DenoiseConfig, rollout_groups
from drift.tasks import score


class RolloutCallback(Callback):
    """Rolls out every batch, in training and in evaluation, and has the task's reward judge the answers.

    Args:
        group_size: completions of a prompt in training, >= 2.
        completion_length: positions of a completion, a multiple of the block length.
        decode: how to decode in training.
        evaluation: how to decode in validation, test and prediction.
        evaluation_length: positions of a completion there; None: as in training.
        batch_size: rows that are decoded at once on each rank; None: all.
        seed: of all draws; each is keyed by (seed, the prompt's place in the stream, the completion's place
            in its group).

    Raises:
        ConfigError: where a value is outside its range, or lengths don't fit.
    """

    def __init__(
        self,
        group_size: int = 4,
        completion_length: int = 256,
        decode: DenoiseConfig = DenoiseConfig(temperature=1.0),  # noqa: B008 - frozen
        evaluation: DenoiseConfig = DenoiseConfig(),  # noqa: B008 - frozen
        evaluation_length: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if group_size < 2:
            raise ConfigError(
                f"rollout.group_size is {group_size}: advantages compare completions of one prompt; "
                "set it to 2 or more"
            )
        if batch_size is not None and batch_size < 1:
            raise ConfigError(
                f"rollout.batch_size is {batch_size}: set it to 1 or more rows, or null for all"
            )
        self.group_size = group_size
        self.completion_length = completion_length
        self.decode = decode
        self.evaluation = evaluation
        self.evaluation_length = completion_length if evaluation_length is None else evaluation_length
        self.batch_size = batch_size
        self.seed = seed
        self.seconds: dict[str, float] = {}
        decode.require_fits(self.completion_length)
        evaluation.require_fits(self.evaluation_length)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hands the module the function that turns prompts into rollouts."""
        if not isinstance(pl_module, PolicyModule):
            raise ConfigError(
                f"RolloutCallback works with an RLDFModule or SFTModule, not {type(pl_module).__name__}"
            )
        self._require_room(pl_module)
        pl_module.experience = partial(self.experience, trainer)

    def _require_room(self, module: PolicyModule, prompt_length: int = 1) -> None:
        limit = module.policy_config.get("max_sequence_length")
        longest = max(self.completion_length, self.evaluation_length)
        if limit is not None and prompt_length + longest > limit:
            raise ConfigError(
                f"rollout.completion_length is {longest}: with a prompt of {prompt_length} tokens that is "
                f"more than the policy's max_sequence_length of {limit}; lower it, or data.max_prompt_length"
            )

    def experience(self, trainer: Trainer, module: PolicyModule, batch: PromptBatch) -> PromptBatch:
        """The batch with its rollout, rewards included."""
        self._require_room(module, batch.prompt_ids.shape[1])
        training = bool(trainer.training)
        group_size = self.group_size if training else 1
        start = time.perf_counter()
        with module.generating():
            rollout = rollout_groups(
                module.policy,
                batch,
                self.completion_length if training else self.evaluation_length,
                self.decode if training else self.evaluation,
                group_size=group_size,
                batch_size=self.batch_size,
                seed=self.seed,
                on_progress=partial(module.report, "rollout"),
            )
        generated = time.perf_counter()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        problems = [problem for problem in batch.problems for _ in range(group_size)]
        answers = data.template.answers(rollout.completion_ids, problems)
        rewards = score(data.task.reward, answers, problems).to(rollout.completion_ids.device)
        rollout.rewards, rollout.correct = rewards[:, None], rewards >= 1
        self.seconds = {
            "rollout/seconds": generated - start,
            "reward/seconds": time.perf_counter() - generated,
        }
        return replace(batch, rollout=rollout)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Logs what the rollout was like, once."""
        assert isinstance(pl_module, PolicyModule)
        if batch.rollout is None:
            return
        for name, value in pl_module.measure(batch.rollout).items():
            pl_module.log(name, value, prog_bar=name in ("reward/mean", "rollout/timesteps"))
        pl_module.log_dict(self.seconds)
