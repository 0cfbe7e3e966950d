"""The command line: LightningCLI with drift's modules, callbacks and shipped configs; no logic of its own."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from drift.arguments import class_path, expanded, shipped_configs
from drift.callbacks import (
    AnswerCallback,
    CheckpointCallback,
    CollapseCallback,
    CurveCallback,
    DoctorCallback,
    ExportCallback,
    FeedbackCallback,
    MismatchCallback,
    PredictionCallback,
    ProgressCallback,
    PromptCallback,
    RescueCallback,
    RolloutCallback,
    SampleTableCallback,
    SummaryCallback,
    WatchdogCallback,
)
from drift.callbacks.agreement import AgreedConfigCallback
from drift.callbacks.collapse import require_not_stopped
from drift.contract import ConfigError, HungError, SampleError, StorageError, TrainingStopped
from drift.data import PromptDataModule
from drift.messages import explain
from drift.module import RLDFModule
from drift.policy_module import PolicyModule
from drift.resume import RESUME_HELP, meet_anew, require_checkpoint, starting_checkpoint
from drift.sft import SFTModule
from drift.storage import require_file, require_folder

_CALLBACKS = {
    "watchdog": WatchdogCallback,
    "prompt": PromptCallback,
    "doctor": DoctorCallback,
    "rollout": RolloutCallback,
    "feedback": FeedbackCallback,
    "progress": ProgressCallback,
    "samples": SampleTableCallback,
    "collapse": CollapseCallback,
    "mismatch": MismatchCallback,
    "rescue": RescueCallback,
    "summary": SummaryCallback,
    "curve": CurveCallback,
    "export": ExportCallback,
    "answers": AnswerCallback,
    "predictions": PredictionCallback,
    "checkpoint": CheckpointCallback,
}

# What Lightning says of things that are as they should be here.
_HARMLESS = (
    r".*does not have many workers",
    r".*`IterableDataset` has `__len__` defined",
    r".*You have overridden `on_after_batch_transfer` in `LightningModule`",
    r".*The dirpath has changed from",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*no pre-optimization state was saved",
    r".*It is recommended to use `self.log\(.*sync_dist=True",
    r".*Checkpoint directory .* exists and is not empty",
)
_CHATTER = ("Tip:", "TPU available", "GPU available", "`weights_only` was not set", "Seed set to")


class DriftParser(LightningArgumentParser):
    """A parser whose errors are one line, and name the nearest key where one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with the message; raises where jsonargparse itself reads the error."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        keys = [action.dest for action in parser._actions if action.dest != "help"]
        # `drift sft` is a `fit` of another module.
        command = re.match(r"drift (\w+)", parser.usage or "")
        if command is not None:
            message = message.replace("Subcommand 'fit'", f"Subcommand {command[1]!r}")
        sys.exit(f"drift: error: {explain(message, keys, class_path)}")


class DriftCLI(LightningCLI):
    """LightningCLI with drift's callbacks; command line and configs set everything, checkpoints nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks, each under its own key."""
        for key, callback in _CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_argument("--resume", type=Literal["auto"] | None, default=None, help=RESUME_HELP)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments given; sys.argv stays as it is for the ranks that are launched from it."""
        self.config = parser.parse_args(args)
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= (seed or 0) < 2**32:
            raise ConfigError(f"seed_everything is {seed}: set it to 0 or more, below 2**32")

    def instantiate_classes(self) -> None:
        """Makes the objects; what they refuse is reported under the whole name of the setting."""
        settings = self.config[self.config.subcommand]
        require_checkpoint(settings.get("ckpt_path"), settings.resume, self.config.subcommand)
        if settings.trainer.enable_progress_bar is False:
            settings.progress.refresh_rate = 0
            settings.trainer.enable_progress_bar = None
        try:
            super().instantiate_classes()
            self._find_checkpoint(settings)
            self._require_places(settings)
        except ValueError as error:
            found = _config_error(error)
            if found is None:
                raise
            raise ConfigError(f"{_places(str(found), self.config)}{found}") from error

    def instantiate_trainer(self, **settings: Any) -> Any:
        """Makes the trainer; what Lightning refuses is an error of its settings."""
        try:
            trainer = super().instantiate_trainer(**settings)
            ranks: Any = getattr(trainer.strategy, "cluster_environment", None)
            if ranks is not None:
                ranks.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        return trainer

    def _find_checkpoint(self, settings: Any) -> None:
        """Puts a path in the place of `--resume auto`, `last` and `best`."""
        parser: Any = self._parser(self.config.subcommand)
        plain = yaml.safe_load(parser.dump(settings, skip_none=False))
        path = starting_checkpoint(self.trainer, plain)
        self.config_init[self.config.subcommand]["ckpt_path"] = path
        checkpoint: Any = self.trainer.checkpoint_callback
        checkpoint.start = path
        if self.config.subcommand == "fit":
            # A command that is issued again goes on with its logs, and may find nothing left to do.
            again = settings.resume is not None
            if again or path != settings.ckpt_path:
                checkpoint.continue_run(self.trainer.loggers)
            self.model.may_be_finished = again

    def _require_places(self, settings: Any) -> None:
        """Refuses what cannot be written to before there is anything to write."""
        root = settings.trainer.default_root_dir
        if root is not None and self.trainer.loggers:
            raise ConfigError(
                f"trainer.default_root_dir is {str(root)!r}: runs go to the logger's folder; set "
                "trainer.logger.init_args.save_dir to it"
            )
        folders = [("trainer.logger.save_dir", logger.save_dir) for logger in self.trainer.loggers]
        if self.config.subcommand == "fit":
            folders.append(("checkpoint.dirpath", settings.checkpoint.dirpath))
        for key, folder in folders:
            if folder is not None:
                require_folder(key, folder)
        for key in ("summary.path", "answers.path", "predictions.path"):
            if settings.get(key) is not None:
                require_file(key, settings[key])

    def _parse_ckpt_path(self) -> None:
        """Leaves the settings alone: Lightning would take them from the checkpoint."""


class _ParsedOnly(DriftCLI):
    """Reads the settings of a command and makes nothing of them."""

    def instantiate_classes(self) -> None:
        """Makes nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def run(arguments: Sequence[str]) -> None:
    """Runs one command.

    Args:
        arguments: the command and what follows it, as on the command line.
    """
    with errors_in_one_line():
        meet_anew()
        require_not_stopped(_start(DriftCLI, *arguments).trainer)


def parsed(arguments: Sequence[str]) -> Any:
    """The settings that `drift fit` would run with, by their names; no policy and no data are looked for.

    Args:
        arguments: what follows the command, as on the command line.
    """
    return _start(_ParsedOnly, "fit", *arguments).config["fit"]


def _start(kind: type[DriftCLI], command: str, *rest: str) -> DriftCLI:
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_news)
    module: type[PolicyModule] = SFTModule if command == "sft" else RLDFModule
    method = "fit" if command == "sft" else command
    return kind(
        module,
        PromptDataModule,
        args=[method, *expanded(rest)],
        parser_class=DriftParser,
        parser_kwargs={"prog": "drift", "allow_abbrev": False, method: _parser_settings(command)},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=AgreedConfigCallback,
    )


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A context whose foreseen errors end the process with one line."""
    try:
        yield
    except HungError as error:
        sys.stdout.flush()
        sys.stderr.write(f"drift: stopped: {error}\n")
        os._exit(1)
    except (SampleError, StorageError, TrainingStopped) as error:
        sys.exit(f"drift: stopped: {error}")
    except MisconfigurationException as error:
        sys.exit(f"drift: error: {' '.join(str(error).split())}")
    except ValueError as error:
        found = _config_error(error)
        if found is None:
            raise
        sys.exit(f"drift: error: {found}")


def _places(message: str, config: Any) -> str:
    """Where the setting that a message begins with stands: "threshold is 2.0" may be one of several."""
    name = re.match(r"(\w+) is (\S+): ", message)
    if name is None:
        return ""
    found = [key for key, value in vars(config.as_flat()).items() if key.endswith(f".{name[1]}")]
    same = [key for key in found if repr(config[key]) == name[2]]
    return f"{' or '.join(key.partition('.')[2] for key in same)}: " if same else ""


def _is_news(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _CHATTER)


def _config_error(error: BaseException | None) -> ConfigError | None:
    """The ConfigError behind an error: jsonargparse wraps what a class in a Union raises."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__
    return error


def _parser_settings(command: str) -> dict[str, Any]:
    shipped = shipped_configs()
    # What only some commands take cannot stand in the base.
    extra = {"validate": "evaluate", "test": "evaluate", "predict": "predict"}.get(command)
    defaults = [str(shipped[name]) for name in ("base", extra) if name is not None]
    return {
        "usage": f"drift {command} [--config NAME_OR_FILE ...] [--KEY VALUE ...]",
        "default_config_files": defaults,
    }
