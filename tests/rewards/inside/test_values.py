import math
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest

from drift.rewards.inside.values import decode, encode

Point = namedtuple("Point", "x y")


class Colour(IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, -(2**70), 0.1, -0.0, math.inf, 1 + 2j, "", "é\ud800\n\0", b"\n", int,
        bytearray(b"a"), [], [1, [2, (3,)]], (), {1, 2}, frozenset("a"), {"a": [1], (1, 2): None},
        type(None), range(1, 9, 2), array("i", [1, 2]), Counter("aab"), OrderedDict(b=1, a=2),
        deque([1, 2], 3), date(2024, 2, 29), datetime(2024, 2, 29, 1, 2, 3, 4), time(1, 2, 3, 4),
        datetime(2024, 2, 29, tzinfo=UTC), time(1, tzinfo=timezone(timedelta(hours=2))),
        {"a": 1}.keys(), {"a": 1}.items(), timedelta(1, 2, 3), Decimal("1.1"), Fraction(1, 3),
    ],
)  # fmt: skip
def test_values_come_back_equal_and_of_their_type(value: object):
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)
    assert str(back) == str(value)


def test_nan_iterators_and_numbers_too_long_for_decimal_digits():
    assert decode(encode(7**9999)) == 7**9999
    assert math.isnan(decode(encode(math.nan)))
    assert list(decode(encode(x * x for x in range(4)))) == [0, 1, 4, 9]
    assert next(decode(encode(zip([1], "a", strict=True)))) == (1, "a")
    back = decode(encode({1: "a", 2: "a"}.values()))
    assert list(back) == ["a", "a"]
    assert type(back) is type({}.values())


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Point(1, 2), (1, 2)),
        (Colour.RED, 1),
        (Text("a"), "a"),
        (defaultdict(list, a=[1]), {"a": [1]}),
        ([Text("a")], ["a"]),
    ],
)
def test_subclasses_become_what_they_extend(value: object, plain: object):
    back = decode(encode(value))
    assert type(back) is type(plain)
    assert back == plain
    assert type(back[0] if isinstance(plain, list) else back).__eq__ is not Text.__eq__


@pytest.mark.parametrize(
    "value", [object(), len, lambda: 1, type("C", (), {})(), Text, [object()], sys, {1: print}]
)
def test_other_objects_are_refused(value: object):
    with pytest.raises(TypeError, match="no plain data"):
        encode(value)


def test_values_without_end_are_refused():
    def forever():
        while True:
            yield 1

    with pytest.raises(TypeError, match="too long"):
        encode(forever())
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        encode(loop)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x", b"i", b"i\n", b"izz\n", b"l9\n", b"l-1\n", b"l1\n", b"NN", b"s5\nab", b"l1000000000000\nN",
        b"m1\nN", b"S1\nl0\n", b"y4\neval", b"o12\nos.systemabcd", b"o9\nos.systemt1\ns4\ntrue",
        b"o17\nfractions.Fractiont2\ni1\ni0\n",
        b"o18\nbuiltins.dict_keyst1\nl0\n",
        b"l1\n" * 100_000,
    ],
)  # fmt: skip
def test_bytes_that_are_no_encoding_raise(data: bytes):
    with pytest.raises((ValueError, KeyError, ArithmeticError, TypeError, RecursionError)):
        decode(data)
