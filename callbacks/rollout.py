"""Performs rollouts: generates completions, has them judged, and attaches both to the batch."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device

from drift.advantages import refill_size
from drift.contract import ConfigError, PromptBatch, Rollout
from drift.evaluation import GridConfig
from drift.module import RLDFModule
from drift.policy_module import PolicyModule
from drift.progress import forget
from drift.randomness import run_seed
from drift.rollout import DenoiseConfig, rollout_groups
from drift.selection import count_useful
from drift.signals import Stopped
from drift.tasks import ExtraReward, Task, judge, part_names, require_limit, reward_limit


class RolloutCallback(Callback):
    """Rolls out every batch, in training and in evaluation, and has the task's reward judge the answers.

    Args:
        group_size: completions of a prompt in training, >= 2.
        completion_length: positions of a completion, a multiple of the block length.
        decode: how to decode in training.
        evaluation: how to decode in validation and prediction, and in a test that says nothing else.
        evaluation_length: positions of a completion there; None: as in training.
        test: lengths, decode settings and samples of `drift test`.
        extra_rewards: what is added to the task's own reward for training, each with its weight; an answer
            is correct by the task's own reward alone. Every part is logged as `reward/NAME`.
        batch_size: rows that are decoded at once on each rank; None: all.
        seed: of all draws; each is keyed by (seed, the prompt's place in the stream, the completion's place
            in its group). None: that of `seed_everything`.
        refill_rounds: further rounds of a step at most, each of fresh prompts, while fewer than
            model.train_groups groups have differing rewards (DAPO's dynamic sampling); 0: none. A round is as
            large as what is missing makes likely, and at most data.prompts_per_step. Rewards, accuracy and
            timesteps are logged of the first round alone: which prompts come after it depends on its rewards.
        reward_timeout_seconds: how long the rewards of a batch may take, > 0; then training stops with an
            error that names the reward, the completion and the line that it hangs at. None: any time.

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
        test: GridConfig = GridConfig(),  # noqa: B008 - frozen
        extra_rewards: list[ExtraReward] | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        refill_rounds: int = 0,
        reward_timeout_seconds: float | None = 1200.0,
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
        if refill_rounds < 0:
            raise ConfigError(
                f"rollout.refill_rounds is {refill_rounds}: set it to 0 for no further rounds, or more"
            )
        self.group_size = group_size
        self.completion_length = completion_length
        self.decode = decode
        self.evaluation = evaluation
        self.evaluation_length = completion_length if evaluation_length is None else evaluation_length
        self.extra_rewards = extra_rewards or []
        self.batch_size = batch_size
        self.seed = run_seed(seed)
        self.refill_rounds = refill_rounds
        self.reward_timeout_seconds = reward_timeout_seconds
        self.figures: dict[str, float] = {}  # of the last training rollout
        self.seconds: dict[str, float] = {}
        self._logged: set[str] = set()  # figures of the step before
        self._evaluation = ExitStack()
        decode.require_fits(self.completion_length)
        evaluation.require_fits(self.evaluation_length)
        alone = GridConfig().cells(self.evaluation_length, evaluation, self.seed)
        grid = test.cells(self.evaluation_length, evaluation, self.seed)
        self.cells = {"fit": alone, "validate": alone, "test": grid, "predict": alone}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hands the module the function that turns prompts into rollouts."""
        if not isinstance(pl_module, PolicyModule):
            raise ConfigError(
                f"RolloutCallback works with an RLDFModule or SFTModule, not {type(pl_module).__name__}"
            )
        if self.refill_rounds and isinstance(pl_module, RLDFModule) and pl_module.train_groups is None:
            raise ConfigError(
                f"rollout.refill_rounds is {self.refill_rounds}: how many groups are enough says "
                "model.train_groups, which is None; set it, or refill_rounds to 0"
            )
        if isinstance(pl_module, RLDFModule):
            pl_module.sampler.require_fits(pl_module.loss, draws=self.decode.rule == "stochastic")
        pl_module.cells = self.cells[stage]
        self._require_room(pl_module, _longest_prompt(trainer, stage))
        require_limit(self.reward_timeout_seconds)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.measure_parts(part_names(data.task.reward, self.extra_rewards))
        pl_module.measure_confidence(self.decode)
        pl_module.experience = partial(self.experience, trainer)

    def state_dict(self) -> dict[str, Any]:
        """What is logged with the further updates of the rollout at hand."""
        return {"figures": dict(self.figures)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the rollout at hand of an earlier run."""
        self.figures = dict(state_dict["figures"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the processes of the extra rewards; the task's own are the data module's."""
        for part in self.extra_rewards:
            part.reward.close()

    def _require_room(self, module: PolicyModule, prompt_length: int) -> None:
        limit = module.policy_config.get("max_sequence_length")
        keys = {cell.length: "test.lengths" for cell in module.cells}
        keys |= {self.evaluation_length: "evaluation_length", self.completion_length: "completion_length"}
        longest = max(keys)
        if limit is not None and prompt_length + longest > limit:
            raise ConfigError(
                f"rollout.{keys[longest]} is {longest}: with a prompt of {prompt_length} tokens that is "
                f"more than the policy's max_sequence_length of {limit}; lower it, or data.max_prompt_length"
            )

    def experience(
        self, trainer: Trainer, module: PolicyModule, batch: PromptBatch, set_number: int = 0
    ) -> PromptBatch:
        """The batch with its rollout, rewards included; in evaluation with one for each cell of the grid.

        Args:
            trainer: says whether this is training.
            module: owns the policy.
            batch: the prompts.
            set_number: in evaluation, which set of the split they are of.
        """
        self._require_room(module, batch.prompt_ids.shape[1])
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.training:
            # All rounds of a step in one gathering of the weights.
            once = self.refill_rounds and module.gather_for_rollout
            with module.at_own_pace() if once else nullcontext():
                return self._training_experience(module, data, batch)
        try:
            return self._evaluation_experience(trainer, module, data, batch, set_number)
        except Stopped:
            self._end(trainer, module)  # the others come there when they are through
            raise

    def _training_experience(self, module: PolicyModule, data: Any, batch: PromptBatch) -> PromptBatch:
        """The batch with its rollout, and with further rounds where too few groups have differing rewards."""
        assert isinstance(module, RLDFModule)
        self.seconds = {"rollout/seconds": 0.0, "reward/seconds": 0.0}
        batch = self._round(module, data, batch)
        assert batch.rollout is not None
        num_seen = most = data.prompts_per_step
        num_useful = count_useful(batch.rollout, self.group_size, module.device)
        # Of the first round alone: what comes after it is chosen by what came out.
        figures = {**module.measure(batch.rollout), "reward/spread": num_useful / num_seen}
        # Each step has places of its own, whatever earlier ones needed: made again, it is the same.
        place = int(batch.positions[0]) // most * self.refill_rounds * most
        num_rounds, wanted = 1, module.train_groups or 0
        while num_rounds <= self.refill_rounds and (num := refill_size(wanted, num_useful, num_seen, most)):
            more = data.refill.share(place + num_seen - most, num)
            self._require_room(module, more.prompt_ids.shape[1])
            more = self._round(module, data, move_data_to_device(more, module.device))
            if more.rollout is not None:
                batch.refills.append(more)
            num_useful += count_useful(more.rollout, self.group_size, module.device)
            num_seen, num_rounds = num_seen + num, num_rounds + 1
        if wanted:
            figures["update/spread"] = min(num_useful, wanted) / wanted
        if self.refill_rounds:
            figures |= {"rollout/rounds": num_rounds, "rollout/prompts": num_seen}
        self.figures = {name: float(value) for name, value in figures.items()}
        return batch

    def _round(self, module: PolicyModule, data: Any, batch: PromptBatch) -> PromptBatch:
        """The prompts with their rollout, rewards included; ranks without prompts take part, too."""
        with module.alone():
            if not batch.problems:
                with module.generating():
                    return batch  # the others' passes may need this rank
            rollout = self._generate(
                module, batch, self.completion_length, self.decode, self.group_size, self.seed
            )
            start = time.perf_counter()
            self._judge(data, module, data.task, batch, rollout)
            self.seconds["rollout/seconds"] += rollout.seconds
            self.seconds["reward/seconds"] += time.perf_counter() - start
        return replace(batch, rollout=rollout)

    def _evaluation_experience(
        self, trainer: Trainer, module: PolicyModule, data: Any, batch: PromptBatch, set_number: int
    ) -> PromptBatch:
        split = "validation" if trainer.validating or trainer.sanity_checking else "test"
        task = data.evaluation_sets[split][set_number].task
        grid = []
        for cell in module.cells:
            rollout = self._generate(module, batch, cell.length, cell.decode, cell.samples, cell.seed)
            self._judge(data, module, task, batch, rollout)
            rollout.finished = data.template.finished(rollout.completion_ids)
            grid.append(rollout)
        return replace(batch, rollout=grid[0], grid=grid)

    def _generate(
        self,
        module: PolicyModule,
        batch: PromptBatch,
        length: int,
        decode: DenoiseConfig,
        group_size: int,
        seed: int,
    ) -> Rollout:
        start = time.perf_counter()
        with module.generating():
            module.report("rollout", 0, 1)
            rollout = rollout_groups(
                module.policy,
                batch,
                length,
                decode,
                group_size=group_size,
                batch_size=self.batch_size,
                seed=seed,
                on_progress=partial(module.report, "rollout"),
            )
        rollout.seconds = time.perf_counter() - start
        return rollout

    def _judge(
        self, data: Any, module: PolicyModule, task: Task, batch: PromptBatch, rollout: Rollout
    ) -> None:
        group_size = len(rollout.completion_ids) // len(batch.problems)
        problems = [problem for problem in batch.problems for _ in range(group_size)]
        answers = data.template.answers(rollout.completion_ids, problems)
        module.report("reward", 0, 1)
        with reward_limit(self.reward_timeout_seconds, answers, problems):
            judge(batch, rollout, answers, task.reward, self.extra_rewards)
            module.report("reward", 1, 1)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Around all batches: ranks may have different numbers of them.
        assert isinstance(pl_module, PolicyModule)
        pl_module.show_average()  # before weights are gathered
        self._evaluation.enter_context(pl_module.at_own_pace())

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._evaluation.close()
        pl_module.hide_average()
        if pl_module.meet is not None:
            pl_module.meet()

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _start
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _end

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Logs what the rollout was like, with each of its updates."""
        forget(trainer, self._logged - self.figures.keys())
        self._logged = set(self.figures)
        for name, value in self.figures.items():
            pl_module.log(name, value, prog_bar=name in ("reward/mean", "rollout/timesteps"))
        pl_module.log_dict(self.seconds)


def _longest_prompt(trainer: Trainer, stage: str) -> int:
    """Tokens of the longest prompt that is known beforehand: those of evaluation are."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    split = "validation" if stage in ("fit", "validate") else "test"
    return max((found.longest_prompt(data.template) for found in data.evaluation_sets[split]), default=1)
