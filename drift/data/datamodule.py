"""`PromptDataModule` streams the prompts of a task to training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

from datasets import IterableDataset as StreamingDataset
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError, Problem, PromptBatch
from drift.data.benchmarks import (
    Benchmark,
    EvaluationSet,
    chosen,
    evaluation_sources,
    load_sources,
    procedural,
)
from drift.data.endless import require_endless
from drift.data.fitting import fitting_rows
from drift.data.guard import ContaminationGuard
from drift.data.refill import RefillPrompts, require_groups
from drift.data.sources import Source, load_rows
from drift.data.stream import (
    EvaluationPrompts,
    ProceduralRows,
    PromptStream,
    Rows,
    ShuffledRows,
    StreamedRows,
    collate_prompts,
)
from drift.data.template import PromptTemplate
from drift.distributed import rank, require_agreement, share_of_rank, world_size
from drift.models import load_tokenizer, resolve_folder
from drift.randomness import run_seed
from drift.tasks import Task

LongPrompts = Literal["error", "drop"]
_NUM_EXAMPLES = 8


class PromptDataModule(LightningDataModule):
    """Streams prompts: an endless, shuffled stream to training, and finite sets to validation and test.

    Args:
        task: what a problem is, and which reward judges it.
        tokenizer: folder with a tokenizer, a shipped policy's name or a hub id; None: the policy's own.
        train: where training rows come from; None: the task makes them.
        validation: where validation rows come from; None: the task makes `num_validation` of them, and one
            that cannot is trained without validation.
        test: where test rows come from: one source, or several benchmarks by name; None: the task makes
            `num_test` of them.
        benchmarks: names of the benchmarks of `test` to use; None: all.
        prompts_per_step: prompts rolled out for one step, over all ranks.
        evaluation_batch_size: prompts of an evaluation batch on each rank.
        num_validation: rows that a procedural task makes for validation.
        num_test: rows that a procedural task makes for test.
        max_prompt_length: longest prompt, tokens.
        long_prompts: what to do about longer ones: `error` stops before training, `drop` leaves them out.
        system_prompt: put before every prompt.
        chat_template: `auto`: the tokenizer's, or else that of the policy's family where the tokenizer has
            its special tokens, or else the bare text; `none`: the bare text; or a .jinja file, or its text.
        demonstration_length: also give demonstrations, padded to this many tokens; fine-tuning only.
        shuffle: False keeps the order of the training rows.
        seed: of the shuffling; None: that of `seed_everything`.
        contamination_threshold: `fit` stops where training prompts hold validation or test prompts: equal,
            equal but for case, spacing and punctuation, or with this share of their 8-grams, within (0, 1].
        allow_contamination: train on such rows, with a warning.
        drop_contaminated: leave such rows out of training.

    Raises:
        ConfigError: where a value is outside its range.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: str | None = None,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | dict[str, Benchmark] | None = None,
        benchmarks: list[str] | None = None,
        prompts_per_step: int = 8,
        evaluation_batch_size: int = 64,
        num_validation: int = 256,
        num_test: int = 512,
        max_prompt_length: int = 1024,
        long_prompts: LongPrompts = "error",
        system_prompt: str | None = None,
        chat_template: str = "auto",
        demonstration_length: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        contamination_threshold: float = 0.95,
        allow_contamination: bool = False,
        drop_contaminated: bool = False,
    ) -> None:
        super().__init__()
        numbers = {
            "prompts_per_step": prompts_per_step,
            "evaluation_batch_size": evaluation_batch_size,
            "num_validation": num_validation,
            "num_test": num_test,
            "max_prompt_length": max_prompt_length,
            "demonstration_length": 1 if demonstration_length is None else demonstration_length,
        }
        for key, value in numbers.items():
            if value < 1:
                raise ConfigError(f"data.{key} is {value}: set it to 1 or more")
        if long_prompts not in get_args(LongPrompts):
            raise ConfigError(
                f"data.long_prompts is {long_prompts!r}: choose one of {list(get_args(LongPrompts))}"
            )
        self.task = task
        self.tokenizer_path = tokenizer
        self.train_source = train
        self.evaluation_sources = {
            "validation": evaluation_sources("validation", validation, task, num_validation),
            "test": chosen(evaluation_sources("test", test, task, num_test), benchmarks),
        }
        self.prompts_per_step = prompts_per_step
        self.evaluation_batch_size = evaluation_batch_size
        self.max_prompt_length = max_prompt_length
        self.long_prompts = long_prompts
        self.system_prompt = system_prompt
        self.chat_template = chat_template
        self.demonstration_length = demonstration_length
        self.shuffle = shuffle
        self.seed = run_seed(seed)
        self.guard = ContaminationGuard(contamination_threshold, allow_contamination, drop_contaminated)
        self.template: PromptTemplate
        self.tokenizer_folder: Path  # both, once `setup` has run
        self.examples: list[Problem] = []  # the stage's first problems, to be shown and probed with
        self._first: list[Mapping[str, Any]] = []
        self._train: Rows | None = None
        self.refill: RefillPrompts  # beside the stream, once `train_dataloader` has run
        self.evaluation_sets: dict[str, list[EvaluationSet]] = {}  # by split; loader i of a split is set i

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, once `setup` has run."""
        return self.template.tokenizer

    def setup(self, stage: str) -> None:
        """Loads the tokenizer and the rows that the stage needs, and checks every one of them."""
        path = self.tokenizer_path or self._policy_folder()
        self.tokenizer_folder = resolve_folder(path, "data.tokenizer")
        tokenizer = load_tokenizer(path)
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                f"data.tokenizer is {str(path)!r}: it has no padding token; add pad_token to its files"
            )
        module = None if self.trainer is None else self.trainer.lightning_module
        policy_config = getattr(module, "policy_config", {})
        self.template = PromptTemplate(
            tokenizer,
            self.system_prompt,
            self.max_prompt_length,
            policy_config.get("mask_token_id"),
            self.chat_template,
            policy_config.get("model_type"),
        )
        if stage == "fit":
            require_groups(getattr(module, "train_groups", None), self.prompts_per_step)
            if self.trainer is not None:
                require_endless(self.trainer)
        split = "validation" if stage in ("fit", "validate") else "test"
        loaded = load_sources(split, self.evaluation_sources[split], needed=stage != "fit")
        drop = self.long_prompts == "drop"
        self.evaluation_sets[split] = [
            source.fitting(rows, self.template, drop_long=drop) for source, rows in loaded
        ]
        if stage == "fit":
            # Where the task makes the training rows, those that it makes to be judged by are apart from them.
            made = self.train_source is not None
            loaded += load_sources("test", self.evaluation_sources["test"], needed=False, made=made)
            self.guard.compare_with(
                [(source.where, rows, source.task) for source, rows in loaded if made or source.source]
            )
            self._train = self._training_rows()
            first = self._first or islice(self._train.starting_at(0), _NUM_EXAMPLES)
            self.examples = [self.task.problem(row) for row in first]
        else:
            first_set = self.evaluation_sets[split][0]
            self.examples = [first_set.task.problem(row) for row in islice(first_set.rows, _NUM_EXAMPLES)]
        num_rows = {found.where: len(found.rows) for found in self.evaluation_sets[split]}
        if isinstance(self._train, ShuffledRows):
            num_rows["data.train"] = len(self._train.rows)
        require_agreement("the number of rows of data", num_rows)

    def train_dataloader(self) -> Iterable[PromptBatch]:
        """The stream, from the step that training is at."""
        assert self.trainer is not None
        assert self._train is not None
        path = type(self.task).__name__ if self.train_source is None else self.train_source.path
        collate = self._collate(self.task, f"data.train ({path})", self.demonstration_length)
        self.refill = RefillPrompts(self._train, collate)
        stream = PromptStream(
            self._train,
            collate,
            self.prompts_per_step,
            share_of_rank(self.prompts_per_step, "data.prompts_per_step"),
            start_step=self.trainer.global_step * self.trainer.accumulate_grad_batches,
            num_updates=getattr(self.trainer.lightning_module, "num_updates", 1),
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> Any:
        """The validation rows in batches."""
        return self._loaders("validation")

    def test_dataloader(self) -> Any:
        """The test rows in batches; where there are several sets a list, a loader each."""
        return self._loaders("test")

    def predict_dataloader(self) -> Any:
        """The test rows, as in `test_dataloader`."""
        return self._loaders("test")

    def teardown(self, stage: str) -> None:
        """Ends the rewards' processes."""
        self.guard.close()
        tasks = [source.task for sources in self.evaluation_sources.values() for source in sources]
        for task in {id(task): task for task in (self.task, *tasks)}.values():
            task.reward.close()

    def _policy_folder(self) -> Any:
        module = None if self.trainer is None else self.trainer.lightning_module
        folder = getattr(module, "policy_folder", None)
        if folder is None:
            raise ConfigError(
                "data.tokenizer is None and there is no policy to take it from: set it to a folder"
            )
        return folder

    def _training_rows(self) -> Rows:
        source = self.train_source
        if source is None:
            task = procedural(self.task, "data.train")
            self.guard.hold_out(task)
            return ProceduralRows(task, fits=self._is_short if self.long_prompts == "drop" else None)
        rows, where = load_rows(source, self.task, "data.train"), f"data.train ({source.path})"
        if isinstance(rows, StreamingDataset):
            rows = self.guard.watch(rows, self.task, where, self._run_folder)
            if self.long_prompts == "drop":
                rows = rows.filter(self._is_short)
            # Before they are shuffled: that reads thousands of them.
            self._first = list(islice(rows, _NUM_EXAMPLES))
            return StreamedRows(rows, self.seed if self.shuffle else None)
        left_out = self.guard.check(rows, self.task, where, self._run_folder)
        fitting = fitting_rows(
            rows,
            self.task,
            self.template,
            where,
            drop_long=self.long_prompts == "drop",
            demonstration_length=self.demonstration_length,
            skip=left_out,
        )
        return ShuffledRows(cast("Any", fitting), self.seed, self.shuffle)

    def _run_folder(self) -> Path | None:
        """The run's folder, for which all ranks must ask together; None without a trainer."""
        return None if self.trainer is None else Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def _is_short(self, row: Mapping[str, Any]) -> bool:
        return self.template.num_tokens(self.task.problem(row)) <= self.max_prompt_length

    def _collate(self, task: Task, where: str, demonstration_length: int | None = None) -> Any:
        return partial(
            collate_prompts,
            task,
            self.template,
            demonstration_length=demonstration_length,
            where=f"{where} row",
        )

    def _loaders(self, split: str) -> Any:
        share = rank(), world_size()
        prompts = [
            EvaluationPrompts(s.rows, self._collate(s.task, s.where), self.evaluation_batch_size, *share)
            for s in self.evaluation_sets[split]
        ]
        loaders = [DataLoader(batches, batch_size=None) for batches in prompts]
        return loaders[0] if len(loaders) == 1 else loaders
