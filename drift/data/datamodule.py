"""`PromptDataModule` streams the prompts of a task to training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

from datasets import Dataset
from datasets import IterableDataset as StreamingDataset
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError, Problem, PromptBatch
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
from drift.distributed import rank, share_of_rank, world_size
from drift.models import load_tokenizer, resolve_folder
from drift.tasks import ProceduralTask, Task

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
        test: where test rows come from; None: the task makes `num_test` of them.
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
        seed: of the shuffling.

    Raises:
        ConfigError: where a value is outside its range.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: str | None = None,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | None = None,
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
        seed: int = 0,
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
        self.sources = {"train": train, "validation": validation, "test": test}
        self.num_rows = {"validation": num_validation, "test": num_test}
        self.prompts_per_step = prompts_per_step
        self.evaluation_batch_size = evaluation_batch_size
        self.max_prompt_length = max_prompt_length
        self.long_prompts = long_prompts
        self.system_prompt = system_prompt
        self.chat_template = chat_template
        self.demonstration_length = demonstration_length
        self.shuffle = shuffle
        self.seed = seed
        self.template: PromptTemplate
        self.tokenizer_folder: Path  # both, once `setup` has run
        self.examples: list[Problem] = []  # the stage's first problems, to be shown and probed with
        self._first: list[Mapping[str, Any]] = []
        self._train: Rows | None = None
        self._evaluation: dict[str, Sequence[Mapping[str, Any]]] = {}

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
        train_groups = getattr(module, "train_groups", None)
        if stage == "fit" and train_groups is not None and train_groups > self.prompts_per_step:
            raise ConfigError(
                f"model.train_groups is {train_groups}: data.prompts_per_step rolls out only "
                f"{self.prompts_per_step} groups; lower the one or raise the other"
            )
        if stage == "fit":
            if self.trainer is not None and self.trainer.max_steps < 0:
                raise ConfigError("trainer.max_steps is -1: the stream of prompts never ends; set the steps")
            self._train = self._training_rows()
            first = self._first or islice(self._train.starting_at(0), _NUM_EXAMPLES)
            self.examples = [self.task.problem(row) for row in first]
        for split in {"fit": ("validation",), "validate": ("validation",)}.get(stage, ("test",)):
            rows = self._evaluation[split] = self._evaluation_rows(split, needed=stage != "fit")
            if stage != "fit":
                self.examples = [self.task.problem(row) for row in islice(rows, _NUM_EXAMPLES)]

    def train_dataloader(self) -> Iterable[PromptBatch]:
        """The stream, from the step that training is at."""
        assert self.trainer is not None
        assert self._train is not None
        stream = PromptStream(
            self._train,
            self._collate("train", self.demonstration_length),
            self.prompts_per_step,
            share_of_rank(self.prompts_per_step, "data.prompts_per_step"),
            start_step=self.trainer.global_step,
            num_updates=getattr(self.trainer.lightning_module, "num_updates", 1),
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> Iterable[PromptBatch]:
        """The validation rows."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> Iterable[PromptBatch]:
        """The test rows."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> Iterable[PromptBatch]:
        """The test rows."""
        return self._evaluation_loader("test")

    def teardown(self, stage: str) -> None:
        """Ends the reward's processes."""
        self.task.reward.close()

    def _policy_folder(self) -> Any:
        module = None if self.trainer is None else self.trainer.lightning_module
        folder = getattr(module, "policy_folder", None)
        if folder is None:
            raise ConfigError(
                "data.tokenizer is None and there is no policy to take it from: set it to a folder"
            )
        return folder

    def _training_rows(self) -> Rows:
        source = self.sources["train"]
        if source is None:
            return ProceduralRows(self._procedural("train"))
        rows = load_rows(source, self.task, "data.train")
        if isinstance(rows, StreamingDataset):
            if self.long_prompts == "drop":
                rows = rows.filter(self._is_short)
            # Before they are shuffled: that reads thousands of them.
            self._first = list(islice(rows, _NUM_EXAMPLES))
            return StreamedRows(rows.shuffle(seed=self.seed, buffer_size=10_000) if self.shuffle else rows)
        checked = self._checked(rows, f"data.train ({source.path}) row", self.demonstration_length)
        return ShuffledRows(checked, self.seed, self.shuffle)

    def _evaluation_rows(self, split: str, *, needed: bool) -> Sequence[Mapping[str, Any]]:
        source = self.sources[split]
        if source is not None:
            rows = load_rows(source, self.task, f"data.{split}")
            whole = Dataset.from_list(list(rows)) if isinstance(rows, StreamingDataset) else rows
            return self._checked(whole, f"data.{split} ({source.path}) row")
        if needed or isinstance(self.task, ProceduralTask):
            return self._procedural(split).rows(split, self.num_rows[split])
        return []

    def _procedural(self, split: str) -> ProceduralTask:
        if not isinstance(self.task, ProceduralTask):
            raise ConfigError(
                f"data.{split} is None: {type(self.task).__name__} doesn't make its own rows; "
                f"set data.{split}.path to a file or a hub dataset"
            )
        return self.task

    def _checked(self, rows: Dataset, where: str, demonstration_length: int | None = None) -> Any:
        """The rows whose prompts fit, all looked at now: one that doesn't must not stop a run after hours."""
        usable = []
        for number, row in enumerate(rows):
            problem = self.task.problem(cast("Mapping[str, Any]", row))
            if self.long_prompts == "drop" and self.template.num_tokens(problem) > self.max_prompt_length:
                continue
            self.template.encode(problem, f"{where} {number}")
            if demonstration_length is not None:
                self.template.encode_demonstration(problem, demonstration_length, f"{where} {number}")
            usable.append(number)
        if not usable:
            raise ConfigError(
                f"{where}: none of the rows has a prompt of at most data.max_prompt_length "
                f"({self.max_prompt_length}) tokens; raise it"
            )
        return rows.select(usable)

    def _is_short(self, row: Mapping[str, Any]) -> bool:
        return self.template.num_tokens(self.task.problem(row)) <= self.max_prompt_length

    def _collate(self, split: str, demonstration_length: int | None = None) -> Any:
        source = self.sources[split]
        where = f"data.{split} ({source.path if source else type(self.task).__name__}) row"
        return partial(
            collate_prompts, self.task, self.template, demonstration_length=demonstration_length, where=where
        )

    def _evaluation_loader(self, split: str) -> Iterable[PromptBatch]:
        rows = self._evaluation[split]
        if not rows:
            return []
        prompts = EvaluationPrompts(
            rows, self._collate(split), self.evaluation_batch_size, rank(), world_size()
        )
        return DataLoader(prompts, batch_size=None)
