"""Reward of an arithmetic expression that must reach a target with given numbers."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from drift.contract import Problem
from drift.rewards.base import PerSampleReward

_MAX_CHARACTERS = 200  # longer than any honest expression; keeps parser and evaluation shallow
# ASCII digits only: no letters, underscores or points, so that every number is a plain run of digits.
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class CountdownReward(PerSampleReward):
    """1.0 for an expression that makes `problem.row["target"]` from `problem.row["numbers"]`, else 0.0.

    The last line that is not empty is judged: numbers, + - * / and parentheses, with or without "= target"
    behind them. A number may be used as often as it is given, no sign may stand before a number, and the
    arithmetic is exact.
    """

    def score(self, completion: str, problem: Problem) -> float:
        """1.0 or 0.0."""
        lines = [line for line in completion.splitlines() if line.strip()]
        if not lines or len(lines[-1]) > _MAX_CHARACTERS:
            return 0.0
        expression, equals, stated = (part.strip() for part in lines[-1].partition("="))
        target = problem.row["target"]
        if equals and stated != str(target):
            return 0.0
        return float(reaches(expression, problem.row["numbers"], target))


def reaches(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an expression makes the target from the numbers, each used at most as often as it is given.

    Args:
        expression: numbers, + - * / and parentheses; anything may be in it.
        numbers: positive integers.
        target: what its exact value must be.
    """
    if len(expression) > _MAX_CHARACTERS or not _ALLOWED.fullmatch(expression):
        return False
    return _uses_only(expression, numbers) and _value(expression) == target


def _uses_only(expression: str, numbers: Sequence[int]) -> bool:
    return Counter(int(digits) for digits in re.findall("[0-9]+", expression)) <= Counter(numbers)


def _value(expression: str) -> Fraction | None:
    """The exact value, None where the text is no such expression or divides by zero."""
    try:
        return _evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise ValueError(f"{type(node).__name__} is not allowed")
