"""The words of a command line: shipped configs and drift's own classes by their short names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

import drift.rewards
import drift.samplers
import drift.tasks
from drift.contract import ConfigError
from drift.messages import nearest

# Settings that take a class: its short name and what it may leave out (`Uniform` for `UniformSampler`).
_SHORT_NAMES = {
    "sampler": (drift.samplers, "Sampler"),
    "task": (drift.tasks, "Task"),
    "reward": (drift.rewards, "Reward"),
}


def shipped_configs() -> dict[str, Path]:
    """The configs that come with drift, by the names under which `--config` finds them."""
    folder = Path(str(files("drift.configs")))
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))
    }


def expanded(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, with shipped configs and short class names written out."""
    key = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            key = name
            yield f"{name}={_full_value(key, value)}" if equals else argument
        else:
            yield _full_value(key, argument)
            key = ""


def class_path(key: str, value: str) -> str | None:
    """The whole path of a class of drift's, which a config file must give; None where there is none.

    Args:
        key: the setting that takes it.
        value: its short name.
    """
    module, suffix = _SHORT_NAMES.get(key.rpartition(".")[2], (None, ""))
    if module is None or value.removesuffix(suffix) not in _short_names(module, suffix):
        return None
    return f"{module.__name__}.{value.removesuffix(suffix)}{suffix}"


def _short_names(module: ModuleType, suffix: str) -> list[str]:
    return [
        name.removesuffix(suffix)
        for name in module.__all__
        if name.endswith(suffix) and not inspect.isabstract(getattr(module, name))
    ]


def _full_value(key: str, value: str) -> str:
    if key in ("--config", "-c"):
        return _config_file(value)
    module, suffix = _SHORT_NAMES.get(key.rpartition(".")[2], (None, ""))
    if module is None or not value.isidentifier() or value == "null":
        return value  # a path or a file of the user's own
    names = _short_names(module, suffix)
    if value.removesuffix(suffix) not in names:
        raise ConfigError(
            f"{key} is {value!r}: there is no such class{nearest(value, names)}; give one of "
            f"{', '.join(names)}, or the path of your own class"
        )
    return value.removesuffix(suffix) + suffix


class _OnceLoader(yaml.SafeLoader):
    """Takes no key twice in one mapping, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            yaml.constructor.ConstructorError: it has a key twice, or one that is no name.
        """
        seen = set()
        for key_node, _ in node.value:
            place = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem=f"a name cannot be in brackets, {place}; put text with {{{{ }}}} in quotes"
                )
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands there twice, {place}"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _require_settings(file: Path) -> None:
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=_OnceLoader)
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8, or a date that is none
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config is {str(file)!r}: it is no YAML: {reason}; correct it") from error
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise ConfigError(f"--config is {str(file)!r}: it holds {kind}; it must hold settings, KEY: VALUE")


def _config_file(value: str) -> str:
    if Path(value).is_file():
        _require_settings(Path(value))
        return value
    shipped = shipped_configs()
    name = value.removesuffix(".yaml")
    if name not in shipped:
        raise ConfigError(
            f"--config is {value!r}: there is no such file and no shipped config of that name"
            f"{nearest(name, list(shipped))}; shipped: {', '.join(shipped)}"
        )
    return str(shipped[name])
