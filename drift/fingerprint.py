"""Fingerprints: what a result depends on, in words that two results can be compared by."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

# Arguments of tasks and rewards that say how fast something is done, not what comes out.
_HARMLESS = {"num_workers"}


def digest(parts: Iterable[str | bytes]) -> str:
    """A short name for some texts in their order: 16 hexadecimal digits."""
    found = blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # With its length: ("ab", "c") is not ("a", "bc").
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short name for settings, the same for the same ones."""
    return digest([json.dumps(settings, sort_keys=True)])


def describe(thing: Any) -> Any:
    """What a setting is, in plain values: an object is its class and those arguments that it keeps.

    Args:
        thing: a plain value, or an object that keeps its arguments as attributes of their names, with or
            without an underscore before them.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(value) for value in thing]
    if isinstance(thing, set | frozenset):
        return sorted(map(str, thing))
    kind = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind is thing:
        return name
    kept = {}
    for argument in inspect.signature(kind).parameters:
        found = [a for a in (argument, f"_{argument}") if hasattr(thing, a)]
        if found and argument not in _HARMLESS:
            kept[argument] = describe(getattr(thing, found[0]))
    return {"class": name, **kept}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"task": {"seed": 0}} is {"task.seed": 0}."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
