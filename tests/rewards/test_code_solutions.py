"""Real problems with solutions written by hand, which pass every test, and with mutants, which do not."""

import ast
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drift.contract import Problem
from drift.rewards import CodeReward
from drift.rewards.code_tests import prefix_code

# Each goes on from its row's prefix, which ends within the function.
MBPP = {
    0: "return s.replace(ch, '', 1)[::-1].replace(ch, '', 1)[::-1]",
    1: "return sorted(M, key=sum)",
    3: "return l * b * h // 2",
    4: "return re.findall('[a-z][^a-z]*', text)",
    5: "return 'Found a match!' if re.search('^[a-z]+_[a-z]+$', text) else 'Not matched!'",
    6: "return a + a + a + a",
    7: """
    return list(string)

def remove_dirty_chars(string, second_string):
    return "".join(letter for letter in string if letter not in second_string)
""",
    8: "return len(set(arraynums)) < len(arraynums)",
    9: "return any(n * 2 ** n == x + 1 for n in range(1, 64))",
    10: "return [n * i for i in range(1, m + 1)]",
    11: """
    seen = set()
    for number in nums:
        if number in seen:
            return number
        seen.add(number)
    return -1
""",
    12: "return max(sum(inner) for inner in list1)",
    13: "return int(str(binary), 2)",
    14: """
    product = 1
    for number in set(arr):
        product *= number
    return product
""",
    15: "return all(element == K for inner in test_list for element in inner)",
    16: "return [re.sub('[0-9]', '', text) for text in list]",
    17: """
    ways = 1
    for i in range(k):
        ways = ways * (n - i) // (i + 1)
    return ways
""",
    18: """
    odd = 0
    for number in arr:
        odd ^= number
    return odd
""",
    19: """
    return s[0] == s[-1]

def count_Substring_With_Equal_Ends(s):
    return sum(check_Equality(s[i:j]) for i in range(len(s)) for j in range(i + 1, len(s) + 1))
""",
    21: """
    factor, largest = 2, 1
    while n > 1:
        if n % factor == 0:
            n, largest = n // factor, factor
        else:
            factor += 1
    return largest
""",
    22: "return int(format(N, 'b'))",
    23: """
    for number, expected in zip(ar, range(1, N + 1)):
        if number != expected:
            return expected
    return N + 1
""",
}
HUMAN_EVAL = {
    0: "ordered = sorted(numbers)\n    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))",
    1: """
    groups, depth = [""], 0
    for letter in paren_string.replace(" ", ""):
        groups[-1] += letter
        depth += 1 if letter == "(" else -1
        if depth == 0:
            groups.append("")
    return groups[:-1]
""",
    3: """
    balance = 0
    for operation in operations:
        balance += operation
        if balance < 0:
            return True
    return False
""",
    4: "mean = sum(numbers) / len(numbers)\n    return sum(abs(x - mean) for x in numbers) / len(numbers)",
    5: "return [x for number in numbers for x in (number, delimeter)][:-1]",
    6: """
    def depth(group):
        deepest = level = 0
        for letter in group:
            level += 1 if letter == "(" else -1
            deepest = max(deepest, level)
        return deepest
    return [depth(group) for group in paren_string.split()]
""",
    7: "return [text for text in strings if substring in text]",
    8: """
    product = 1
    for number in numbers:
        product *= number
    return sum(numbers), product
""",
    9: "return [max(numbers[:i + 1]) for i in range(len(numbers))]",
    11: "return ''.join('1' if x != y else '0' for x, y in zip(a, b))",
    12: "return max(strings, key=len) if strings else None",
    13: "while b:\n        a, b = b, a % b\n    return a",
    14: "return [string[:i + 1] for i in range(len(string))]",
    15: "return ' '.join(str(i) for i in range(n + 1))",
    16: "return len(set(string.lower()))",
    17: "return [{'o': 4, 'o|': 2, '.|': 1}[note] for note in music_string.split()]",
    18: "return sum(string[i:].startswith(substring) for i in range(len(string)))",
    20: "near = sorted(numbers)\n    return min(zip(near, near[1:]), key=lambda pair: pair[1] - pair[0])",
    21: "low, high = min(numbers), max(numbers)\n    return [(x - low) / (high - low) for x in numbers]",
    22: "return [value for value in values if isinstance(value, int)]",
    23: "return len(string)",
    24: "return max(i for i in range(1, n) if n % i == 0)",
    25: """
    factors, factor = [], 2
    while n > 1:
        if n % factor == 0:
            factors.append(factor)
            n //= factor
        else:
            factor += 1
    return factors
""",
    26: "return [x for x in numbers if numbers.count(x) == 1]",
    27: "return string.swapcase()",
}
SOLUTIONS = {"MBPP": MBPP, "HumanEval": HUMAN_EVAL}
_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitXor: ast.BitOr,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def mutants(code: str, first_line: int) -> Iterator[str]:
    """The code with one operator, number or returned value changed, in each of them another one."""
    tree = ast.parse(code)
    nodes = [node for node in ast.walk(tree) if getattr(node, "lineno", 0) >= first_line]
    for place, node in enumerate(nodes):
        changed = copy.deepcopy(tree)
        twin = [n for n in ast.walk(changed) if getattr(n, "lineno", 0) >= first_line][place]
        if mutate(node, twin):
            yield ast.unparse(ast.fix_missing_locations(changed))


def mutate(node: ast.AST, twin: Any) -> bool:
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        twin.op = _OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
        twin.ops[0] = _OPERATORS[type(node.ops[0])]()
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        twin.value = node.value + 1
    elif isinstance(node, ast.Return) and node.value is not None:
        twin.value = ast.Constant(None)
    else:
        return False
    return True


def rows(shared: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((shared / "data" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_solutions_written_by_hand_pass_every_test(bwrap: None, shared: Path, name: str):
    found = rows(shared, name)
    answers = [f"{found[n]['prefix']}    {body}\n```\n" for n, body in SOLUTIONS[name].items()]
    problems = [
        Problem(prompt="", answer="", answer_prefix=found[n]["prefix"], row=found[n]) for n in SOLUTIONS[name]
    ]
    rewards = dict(zip(SOLUTIONS[name], CodeReward()(answers, problems).tolist(), strict=True))
    assert {n: reward for n, reward in rewards.items() if reward != 1.0} == {}
    assert len(rewards) >= 20


@pytest.mark.parametrize("name", SOLUTIONS)
def test_mutants_of_solutions_pass_less(bwrap: None, shared: Path, name: str):
    found, made = rows(shared, name), []
    for n, body in SOLUTIONS[name].items():
        start = prefix_code(found[n]["prefix"])
        # The last of the walk: deep inside, where a change shows in some cases only; and the plainest one.
        variants = [*mutants(f"{start}    {body}\n", len(start.rstrip("\n").split("\n")) + 1)]
        made += [(n, variant) for variant in [*variants[:1], *variants[1:][-2:]]]
    answers = [f"```python\n{variant}\n```" for _, variant in made]
    problems = [Problem(prompt="", answer="", row=found[n]) for n, _ in made]
    rewards = CodeReward(timeout_seconds=1.0)(answers, problems).tolist()
    worse = [n for (n, _), reward in zip(made, rewards, strict=True) if reward < 1]
    assert set(worse) == set(SOLUTIONS[name])  # at least one mutant of every solution
    assert len(worse) >= 0.9 * len(made), [m for m, r in zip(made, rewards, strict=True) if r == 1]
