"""What the command line says of a setting it cannot read: one line with key, value and a hint."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

_PLACE = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"given class_path '([^']+)'")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
# How jsonargparse and argparse name a key that they don't know.
_UNKNOWN = re.compile(
    r"(?:(?:does not accept option|Option|Key|key|group) ['\"]|nrecognized arguments: --)([\w.]+)"
)
_EXPECTED = re.compile(r"Expected a (.+?)(?:\. Got value: .*)?")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
# What stands between two commas that are in no brackets.
_SUBTYPE = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_VALUE = re.compile(r"(?:Given|Got) value: (.*)$", re.MULTILINE)
_NESTED = re.compile(r"NestedArg\(key='.*', val='(.*)'\)")
# The key of a value inside a mapping: what stands before the name of the unknown setting.
_NESTED_KEY = re.compile(r"NestedArg\(key='([^']+)\.[^'.]+'")
_NO_VALUE = re.compile(r"argument --\S+: expected one argument")
# Lines that say how the parser went about it, not what is wrong.
_NOISE = (
    "Parser key",
    "Problem with given class_path",
    "Expected a path but",
    "Expected a dot import path",
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "Given value",
)


def nearest(key: str, keys: Sequence[str]) -> str:
    """The words that suggest the nearest of some keys, or nothing where none is near."""
    near = get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def explain(message: str, keys: Sequence[str], class_path: Callable[[str, str], str | None]) -> str:
    """The parser's message in one line.

    Args:
        message: what jsonargparse says.
        keys: the keys that the command knows.
        class_path: of a key and a class's short name, which files don't take, gives the whole path.
    """
    places = _PLACE.findall(message)
    option, classes = _OPTION.search(message), _CLASS.findall(message)
    if places and option and classes:
        inside = _NESTED_KEY.search(message)
        place = ".".join([*places, *(inside.groups() if inside else ())])
        return _unknown_argument(place, option[1], classes[-1])
    required = _REQUIRED.search(message)
    if required:
        return _required(places, required[1], classes)
    unknown = None if places else _UNKNOWN.search(message)
    if unknown:
        return f"{' '.join(message.split())}{nearest(unknown[1], keys)}"
    if not places:
        dashed = "; give a value that begins with '-' as --KEY=VALUE" if _NO_VALUE.search(message) else ""
        return f"{' '.join(message.split())}{dashed}"
    # The innermost setting is named last; what stands behind its value is about those around it.
    inner = _PLACE.split(message)[-1]
    missing = _NO_CLASS.search(inner)
    if missing and "Subtypes:" not in inner:
        whole = class_path(places[-1], missing[1])
        if whole:
            return f"{'.'.join(places)} is {missing[1]!r}: in a config file give the whole path, {whole}"
        reason = "there is no such class; give the name of one of drift's, or the path of your own"
        return f"{'.'.join(places)} is {missing[1]!r}: {reason}"
    value = _VALUE.search(inner)
    shown = ""
    if value is not None:
        nested = _NESTED.fullmatch(value[1])
        given = nested[1] if nested else value[1]
        shown = f" is {given}"
        whole = class_path(places[-1], given)
        if whole:
            return f"{'.'.join(places)}{shown}: in a config file give the whole path, {whole}"
        inner = inner[: value.end()]
    return f"{'.'.join(places)}{shown}: {_reason(inner)}"


def _unknown_argument(place: str, name: str, class_path: str) -> str:
    names = _arguments(class_path)
    hint = nearest(f"{place}.{name}", [f"{place}.{known}" for known in names])
    known = f" (it has {', '.join(names)})" if names else ""
    return f"{place}.{name}: {class_path.rpartition('.')[2]} has no such setting{known}{hint}"


def _required(places: Sequence[str], names: str, classes: Sequence[str]) -> str:
    if places:
        return f"{'.'.join(places)}: {classes[-1].rpartition('.')[2]} cannot do without {names}; set it"
    # The parser puts the command before the keys of its settings.
    keys = re.sub(r"\b\w+\.((?:model|data)\.)", r"\1", names)
    recipe = "; start from a recipe, such as --config quickstart, or set them" if keys != names else ""
    return f"required, and not given: {keys}{recipe}"


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _reason(message: str) -> str:
    lines = [line.strip().removeprefix("- ") for line in message.removeprefix(":").splitlines()]
    reasons = [
        line for line in lines if line and not line.startswith(_NOISE) and not _EXPECTED.fullmatch(line)
    ]
    if reasons:
        return "; ".join(reasons)
    subtypes = [kind.strip() for shown in _SUBTYPES.findall(message) for kind in _SUBTYPE.findall(shown)]
    kinds = subtypes or [expected[1] for line in lines if (expected := _EXPECTED.fullmatch(line))]
    return f"it must be {' or '.join(_type_name(kind) for kind in kinds)}" if kinds else "it cannot be read"


def _type_name(kind: str) -> str:
    if kind == "<class 'NoneType'>":
        return "null"
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if literal:
        return f"one of {literal[1]}"
    plain = re.fullmatch(r"<class '(?:.*\.)?(\w+)'>", kind)
    return plain[1] if plain else re.sub(r"(?:\w+\.)+(\w+)", r"\1", kind)
