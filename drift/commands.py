"""Which function runs which command, and the commands that tell of a run without starting it."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace

from drift import cli
from drift.comparison import comparison
from drift.contract import ConfigError
from drift.doctor import examine_folder, failures, table
from drift.export import export
from drift.plan import PlanSettings, advice, plan_memory, policy_sizes, report
from drift.plan.memory import GIB
from drift.policy_module import DType
from drift.rollout import DenoiseConfig
from drift.samplers import WeightedSampler

_PLAN_HELP = """\
Says how much memory `drift fit` with these settings would need on each GPU, whether it fits, and what to
change where it does not. Nothing is downloaded and no weights are read: any machine will do, in seconds.

Columns: `update` is the largest moment of forward and backward passes, `step` the optimizer's, `rollout` that
of generating answers, in training or evaluation. Prompts are as long as data.max_prompt_length allows."""
_PLAN_EXAMPLES = """\
It takes every setting of `drift fit` (see `drift fit --help`):
  drift plan --config llada_math --num_gpus 8 --gpu_memory 80
  drift plan --config llada_math --model.dtype bfloat16 --model.micro_batch_size 1
  drift plan --config llada_math --model.policy FOLDER
"""
_COMPARE_HELP = """\
Compares the results of two tests, each data set at each length and decode setting that both have: accuracies,
their difference B - A with a 95 % interval, and over the same prompts an exact sign test. It warns where the
two were not measured in the same way, and names the settings that differ."""


class _OneLineParser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with the message."""
        sys.exit(f"drift: error: {message}")


def run(arguments: Sequence[str]) -> None:
    """Runs one command.

    Args:
        arguments: the command and what follows it, as on the command line.
    """
    command, *rest = arguments
    if command in _COMMANDS:
        with cli.errors_in_one_line():
            _COMMANDS[command](rest)
    else:
        cli.run(arguments)


def plan(arguments: Sequence[str]) -> None:
    """Prints the memory plan of a training run.

    Args:
        arguments: what follows `drift plan`.
    """
    parser = _OneLineParser(
        "drift plan",
        usage="drift plan [--num_gpus N] [--gpu_memory GIB] [--config NAME_OR_FILE ...] [--KEY VALUE ...]",
        description=_PLAN_HELP,
        epilog=_PLAN_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--num_gpus", default="1", metavar="N", help="GPUs of the run, over all machines (default: 1)"
    )
    parser.add_argument(
        "--gpu_memory", default="80", metavar="GIB", help="memory of one GPU, GiB (default: 80)"
    )
    own, others = parser.parse_known_args(arguments)
    num_gpus = int(_number("num_gpus", own.num_gpus, whole=True))
    gpu_memory = int(_number("gpu_memory", own.gpu_memory, whole=False) * GIB)
    found = plan_memory(plan_settings(cli.parsed(others), num_gpus))
    fits = found.fits(gpu_memory)
    sys.stdout.write(report(found, gpu_memory, None if fits else advice(found.settings, gpu_memory)))


def doctor(path: str, tokenizer: str | None = None, dtype: DType = "float32") -> None:
    """Checks a policy before anything is trained with it; where one fails the exit status is 1.

    Args:
        path: a Hugging Face folder, the bare name of a policy that comes with drift, or a hub id.
        tokenizer: another folder to take the tokenizer from; None: the policy's own.
        dtype: to load the weights in.
    """
    checks = examine_folder(path, tokenizer, getattr(torch, dtype))
    sys.stdout.write(f"{table(checks)}\n")
    if failures(checks):
        sys.exit(1)


def compare(arguments: Sequence[str]) -> None:
    """Prints the difference between two results files.

    Args:
        arguments: the two files.
    """
    parser = _OneLineParser(
        "drift compare",
        usage="drift compare A.json B.json",
        description=_COMPARE_HELP,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="A.json", help="results that `drift test` or `drift validate` wrote")
    parser.add_argument("second", metavar="B.json", help="the results to compare with them")
    own = parser.parse_args(list(arguments))
    sys.stdout.write(comparison(Path(own.first), Path(own.second)))


def _called(function: Callable[..., None]) -> Callable[[Sequence[str]], None]:
    """A command whose options are a function's arguments."""

    def run(arguments: Sequence[str]) -> None:
        name = function.__name__
        usage = f"drift {name} [--KEY VALUE ...]"
        parser = cli.DriftParser(
            f"drift {name}", usage=usage, description=(function.__doc__ or "").partition("\n")[0]
        )
        parser.add_function_arguments(function)
        function(**vars(parser.parse_args(list(arguments))))

    return run


def plan_settings(settings: Any, num_gpus: int) -> PlanSettings:
    """What the memory plan needs of the settings of a training run.

    Args:
        settings: of `drift fit`, parsed, by their names.
        num_gpus: ranks of the run.

    Raises:
        ConfigError: where a value is outside its range.
    """
    model, data, rollout, trainer = settings.model, settings.data, settings.rollout, settings.trainer
    lora = model.lora
    reference = None
    if model.reference not in (None, model.policy) and model.loss.beta > 0:
        reference = policy_sizes(model.reference, "model.reference")
    return PlanSettings(
        policy=policy_sizes(model.policy),
        reference=reference,
        beta=model.loss.beta,
        entropy_coeff=model.loss.entropy_coeff,
        dtype=model.dtype,
        precision=str(trainer.precision),
        master_weights=model.optimizer.master_weights,
        average=model.optimizer.ema_decay > 0,
        activation_checkpointing=model.activation_checkpointing,
        lora_rank=None if lora is None else lora.rank,
        lora_targets=None if lora is None or lora.targets is None else tuple(lora.targets),
        gather_for_rollout=model.gather_for_rollout,
        num_updates=model.num_updates,
        micro_batch_size=model.micro_batch_size,
        micro_batch_tokens=model.micro_batch_tokens,
        states_per_row=_max_states(model.sampler),
        train_groups=model.train_groups,
        max_prompt_length=data.max_prompt_length,
        prompts_per_step=data.prompts_per_step,
        evaluation_batch_size=data.evaluation_batch_size,
        group_size=rollout.group_size,
        completion_length=rollout.completion_length,
        evaluation_length=rollout.evaluation_length,
        rollout_batch_size=rollout.batch_size,
        decode=DenoiseConfig(**vars(rollout.decode)),
        evaluation=DenoiseConfig(**vars(rollout.evaluation)),
        strategy=getattr(trainer.strategy, "class_path", trainer.strategy),
        num_gpus=num_gpus,
    )


def _max_states(sampler: Any) -> int | None:
    """Noisy states that a sampler takes of a completion, at most; None where there may be any number."""
    if sampler is None:
        return WeightedSampler().max_states
    module, _, name = sampler.class_path.rpartition(".")
    arguments = sampler.get("init_args", Namespace()).as_dict()
    return getattr(import_module(module), name)(**arguments).max_states


def _number(key: str, text: str, *, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0.0
    if not math.isfinite(value) or value <= 0:
        kind = "a whole number, 1 or more" if whole else "a positive number of GiB"
        raise ConfigError(f"{key} is {text!r}: set it to {kind}")
    return value


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "plan": plan,
    "doctor": _called(doctor),
    "export": _called(export),
    "compare": compare,
}
