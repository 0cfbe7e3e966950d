"""Plain data as bytes: what may pass between a candidate and the tests."""

from __future__ import annotations

TYPE_CHECKING = False  # loading typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_MAX_ITEMS = 1 << 17  # of an iterator that a function returns
# Types of the standard library: what each is called with to build an equal value.
_PARTS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "array.array": lambda value: (value.typecode, value.tolist()),
    # Parts of a dictionary are built as those of one with other keys or values.
    "builtins.dict_keys": lambda value: (dict.fromkeys(value),),
    "builtins.dict_values": lambda value: (dict(enumerate(value)),),
    "builtins.dict_items": lambda value: (dict(value),),
    "builtins.range": lambda value: (value.start, value.stop, value.step),
    "collections.Counter": lambda value: (dict(value),),
    "collections.OrderedDict": lambda value: (list(value.items()),),
    "collections.deque": lambda value: (list(value), value.maxlen),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.datetime": lambda value: (*value.timetuple()[:6], value.microsecond, _zone(value)),
    "datetime.time": lambda value: (value.hour, value.minute, value.second, value.microsecond, _zone(value)),
    "datetime.timezone": lambda value: (value.utcoffset(None),),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "decimal.Decimal": lambda value: (str(value),),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
}
_VIEWS: dict[str, Callable[[dict[Any, Any]], object]] = {
    "builtins.dict_keys": dict.keys,
    "builtins.dict_values": dict.values,
    "builtins.dict_items": dict.items,
}
_CONTAINERS: dict[bytes, type] = {b"l": list, b"t": tuple, b"S": set, b"z": frozenset}
_CONSTANTS = {b"N": None, b"T": True, b"F": False}
# As arguments, such as "remove all numbers of this type".
_TYPES = {
    kind.__name__: kind
    for kind in (int, float, complex, bool, str, bytes, list, tuple, dict, set, frozenset, type(None))
}
_RAW: dict[bytes, Callable[[bytes], object]] = {
    b"s": lambda raw: raw.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"B": bytearray,
    b"y": lambda raw: _TYPES[raw.decode()],
}


def encode(value: object) -> bytes:
    """The bytes from which `decode` builds an equal value, of exact built-in types.

    Values of a subclass become values of the type it extends, and an iterator becomes an iterator over the
    items it had left.

    Args:
        value: numbers, text, bytes, None, built-in types, containers of such, and the usual values of the
            standard library.

    Raises:
        TypeError: it holds something else, such as a function or an object of a class of its own.
        RecursionError: it is nested too deeply, or holds itself.
    """
    parts: list[bytes] = []
    _write(value, parts.append)
    return b"".join(parts)


def decode(data: bytes) -> Any:
    """The value of an encoding, which may come from anyone.

    Raises:
        Exception: of any kind, where the bytes are no encoding.
    """
    value, end = _read(data, 0)
    if end != len(data):
        raise ValueError("bytes are left over")
    return value


def _write(value: Any, put: Callable[[bytes], None]) -> None:
    if value is None or value is True or value is False:
        put(b"N" if value is None else b"T" if value else b"F")
    elif isinstance(value, int):
        # Unlike decimal digits, hexadecimal ones know no limit.
        put(b"i%s\n" % format(int(value), "x").encode())
    elif isinstance(value, float):
        put(b"f%s\n" % repr(float(value)).encode())
    elif isinstance(value, complex):
        put(b"c%s\n%s\n" % (repr(value.real).encode(), repr(value.imag).encode()))
    elif isinstance(value, str):
        _write_raw(b"s", value.encode("utf-8", "surrogatepass"), put)
    elif isinstance(value, bytes | bytearray):
        _write_raw(b"b" if isinstance(value, bytes) else b"B", bytes(value), put)
    else:
        _write_compound(value, put)


def _write_compound(value: Any, put: Callable[[bytes], None]) -> None:
    if _is_known_type(value):
        return _write_raw(b"y", value.__name__.encode(), put)
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    tag = next((tag for tag, kind in _CONTAINERS.items() if isinstance(value, kind)), None)
    if name in _PARTS:
        _write_raw(b"o", name.encode(), put)
        _write(_PARTS[name](value), put)
    elif tag is not None:
        _write_items(tag, value, put)
    elif isinstance(value, dict):
        _write_items(b"m", [part for pair in value.items() for part in pair], put)
    elif hasattr(type(value), "__next__"):
        items = [item for _, item in zip(range(_MAX_ITEMS), value, strict=False)]
        if len(items) == _MAX_ITEMS:
            raise TypeError("the iterator is too long")
        _write_items(b"I", items, put)
    else:
        raise TypeError(f"{name} is no plain data")
    return None


def _zone(value: Any) -> Any:
    """The time zone, as the difference that it is at that time."""
    offset = value.utcoffset()
    return None if offset is None else __import__("datetime").timezone(offset)


def _is_known_type(value: object) -> bool:
    return isinstance(value, type) and _TYPES.get(value.__name__) is value


def _write_raw(tag: bytes, raw: bytes, put: Callable[[bytes], None]) -> None:
    put(b"%s%d\n" % (tag, len(raw)))
    put(raw)


def _write_items(tag: bytes, value: Iterable[Any], put: Callable[[bytes], None]) -> None:
    items = list(value)
    put(b"%s%d\n" % (tag, len(items)))
    for item in items:
        _write(item, put)


def _read(data: bytes, start: int) -> tuple[Any, int]:
    tag, start = data[start : start + 1], start + 1
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], start
    text, start = _line(data, start)
    if tag == b"i":
        return int(text, 16), start
    if tag == b"f":
        return float(text), start
    if tag == b"c":
        imaginary, start = _line(data, start)
        return complex(float(text), float(imaginary)), start
    size = int(text)
    if not 0 <= size <= len(data) - start:
        raise ValueError("a size is wrong")
    if tag == b"o":
        parts, end = _read(data, start + size)
        return _build(data[start : start + size].decode(), parts), end
    if tag in _RAW:
        return _RAW[tag](data[start : start + size]), start + size
    return _read_items(tag, size, data, start)


def _read_items(tag: bytes, size: int, data: bytes, start: int) -> tuple[Any, int]:
    items: list[Any] = []
    for _ in range(size):
        item, start = _read(data, start)
        items.append(item)
    if tag == b"m":
        return dict(zip(items[::2], items[1::2], strict=True)), start
    return iter(items) if tag == b"I" else _CONTAINERS[tag](items), start


def _line(data: bytes, start: int) -> tuple[str, int]:
    end = data.index(b"\n", start)
    return data[start:end].decode("ascii"), end + 1


def _build(name: str, parts: tuple[Any, ...]) -> Any:
    if name not in _PARTS:
        raise ValueError(f"{name} is no plain data")
    if name in _VIEWS:
        return _VIEWS[name](*parts)
    module, _, kind = name.partition(".")
    return getattr(__import__(module), kind)(*parts)
