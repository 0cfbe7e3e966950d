"""Countdown: reach a target with given numbers and the four operations."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from random import Random
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import CountdownReward
from drift.rewards.countdown import reaches
from drift.tasks.procedural import ProceduralTask

_PROMPT = (
    "Use each of the numbers {numbers} at most once with + - * / to make {target}. Write the expression only."
)
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_SWAPPED = str.maketrans("+-*/", "-+/*")
_MAX_DRAWS = 10_000


class CountdownTask(ProceduralTask):
    """Numbers and a target that some expression with all of them reaches through positive integers only.

    The target is never one of the numbers, and the order of the numbers does not make another puzzle. Rows
    may also come from a file with `numbers` and `target`, and perhaps `solution` and `demonstration`.

    Args:
        num_numbers: numbers given, 2 to 6.
        max_number: largest number given, >= 2.
        max_target: largest target, >= 1.
        seed: key of all draws.
        prompt: the question; {numbers} and {target} are filled in.
        right_share: share of demonstrations that are the solution, 0 to 1; in the others + and - have traded
            places, and * and /, so that a policy tuned on them is sure of the form alone.

    Raises:
        ConfigError: an argument is out of its range.
    """

    fields = ("numbers", "target")

    def __init__(
        self,
        num_numbers: int = 3,
        max_number: int = 20,
        max_target: int = 100,
        seed: int = 0,
        prompt: str = _PROMPT,
        right_share: float = 1.0,
    ) -> None:
        super().__init__(seed)
        if not 2 <= num_numbers <= 6:
            raise ConfigError(f"num_numbers={num_numbers!r} must be within 2 to 6")
        if max_number < 2:
            raise ConfigError(f"max_number={max_number!r} must be at least 2")
        if max_target < 1:
            raise ConfigError(f"max_target={max_target!r} must be at least 1")
        if "{numbers}" not in prompt or "{target}" not in prompt:
            raise ConfigError(f"prompt={prompt!r} must contain {{numbers}} and {{target}}")
        if not 0.0 <= right_share <= 1.0:
            raise ConfigError(f"right_share={right_share!r} must be within 0 to 1")
        self.num_numbers = num_numbers
        self.max_number = max_number
        self.max_target = max_target
        self.prompt = prompt
        self.right_share = right_share
        self.reward = CountdownReward()

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of reaching a row's target.

        Raises:
            ConfigError: its numbers are no integers, or its solution does not reach its target.
        """
        self.require_fields(row)
        numbers, target, solution = row["numbers"], row["target"], row.get("solution")
        good = isinstance(numbers, list | tuple) and bool(numbers) and all(map(_is_positive, numbers))
        self.require(good, row, "numbers", "a list of integers greater than 0")
        self.require(_is_positive(target), row, "target", "an integer greater than 0")
        good = solution is None or (isinstance(solution, str) and reaches(solution, numbers, target))
        self.require(good, row, "solution", f"an expression of {list(numbers)} that makes {target}")
        demonstration = row.get("demonstration", solution)
        good = demonstration is None or isinstance(demonstration, str)
        self.require(good, row, "demonstration", "a text, or absent")
        # Not str.format: other braces of a prompt, such as those of LaTeX, are text.
        listed = ", ".join(map(str, numbers))
        prompt = self.prompt.replace("{numbers}", listed).replace("{target}", str(target))
        return Problem(prompt=prompt, answer=solution or "", demonstration=demonstration, row=dict(row))

    def generate(self, rng: Random) -> dict[str, Any]:
        """A row with random numbers and the value of a random expression of them."""
        for _ in range(_MAX_DRAWS):
            numbers = [rng.randint(1, self.max_number) for _ in range(self.num_numbers)]
            target, solution = _random_expression(rng, numbers)
            if target <= self.max_target and target not in numbers:
                row = {"numbers": numbers, "target": target, "solution": solution}
                right = _draw_ahead(rng) < self.right_share
                return row if right else {**row, "demonstration": solution.translate(_SWAPPED)}
        raise ConfigError(f"max_target={self.max_target} is hardly ever met: raise it or lower max_number")

    def canonical(self, row: dict[str, Any]) -> str:
        """The sorted numbers and the target."""
        return f"{sorted(row['numbers'])}={row['target']}"


def _draw_ahead(rng: Random) -> float:
    """A draw that leaves `rng` as it was, so that what it decides changes no later row."""
    ahead = Random()
    ahead.setstate(rng.getstate())
    return ahead.random()


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _random_expression(rng: Random, numbers: list[int]) -> tuple[int, str]:
    """Value and text of an expression that uses every number once."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        left, right = sorted((terms.pop(rng.randrange(len(terms))) for _ in range(2)), reverse=True)
        symbols = ["+", "*"]
        if left[0] > right[0]:
            symbols.append("-")
        if left[0] % right[0] == 0:
            symbols.append("/")
        symbol = rng.choice(symbols)
        text = f"({left[1]}{symbol}{right[1]})"
        terms.append((_OPERATIONS[symbol](left[0], right[0]), text))
    value, text = terms[0]
    return value, text[1:-1]  # the outermost parentheses say nothing
