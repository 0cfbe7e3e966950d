"""Splits test code into its assertions, each of them one test, so that it says which of them hold.

The tests run as they are written: every `assert`, wherever it stands, is wrapped so that it reports to
`__drift__` (see drift.rewards.inside.checker) instead of ending the run. Names that neither the tests nor
the code given to the policy define stand for functions of the answer.
"""

from __future__ import annotations

import ast
import builtins
import copy
import symtable
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_FENCE = "```"
_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """One test source, rewritten."""

    source: str
    names: tuple[str, ...]  # in the source, of functions that the answer defines


@dataclass(frozen=True, kw_only=True, slots=True)
class TestCode:
    """The tests of a problem."""

    scripts: tuple[Script, ...]
    required: frozenset[int]  # tests that must be reached and hold
    optional: frozenset[
        int
    ]  # tests that count where they are reached: under an `if` or `except`, or `assert False`

    def share(self, passed: Iterable[int], failed: Iterable[int]) -> float:
        """The share of tests that hold, 0 to 1.

        Args:
            passed: tests that were reported as held.
            failed: tests that were reported as failed, which outweighs the former.
        """
        bad = set(failed)
        good = set(passed) - bad
        reached = self.required | (self.optional & (good | bad))
        return len(reached & good) / len(reached) if reached else 0.0


def split_tests(sources: Sequence[str], prefix: str = "") -> TestCode:
    """The tests that some test sources hold.

    Args:
        sources: Python code with assertions, which calls its own functions itself (`check(add)`).
        prefix: what the answer starts with; helpers that stand there before the function to be completed
            are the tests' own, so that an answer cannot bend them.

    Raises:
        ValueError: a source is no Python code, asserts nothing, or needs a module that the sandbox lacks.
    """
    helpers = _helpers(prefix)
    marker = _Marker()
    scripts = []
    for number, source in enumerate(sources):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"test {number} is no Python code: {error}") from error
        before = len(marker.required)
        scripts.append(_script(tree, helpers, marker))
        if len(marker.required) == before:
            raise ValueError(f"test {number} has no assertion that an answer could fail")
    return TestCode(
        scripts=tuple(scripts), required=frozenset(marker.required), optional=frozenset(marker.optional)
    )


def _script(tree: ast.Module, helpers: Sequence[ast.stmt], marker: _Marker) -> Script:
    _untangle(tree)
    runners = _runners(tree)
    # What the tests are run for is the answer's, even if Python has a function of that name.
    asked = {arg.id for call in runners.values() for arg in call.args if isinstance(arg, ast.Name)}
    needed = _needed(helpers, _globals(tree).free - asked)
    own = ast.Module(body=[*needed, *tree.body], type_ignores=[])
    names = _globals(own).free - (set(dir(builtins)) - asked) - {"__name__"}
    _refuse_foreign_modules(own)
    body = [*needed, *marker.mark(tree, runners)]
    if "random" in _modules(own):
        # The same answer must get the same reward every time.
        body[:0] = ast.parse("__import__('random').seed(0)").body
    module = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    return Script(source=ast.unparse(module), names=tuple(sorted(names)))


def _untangle(tree: ast.Module) -> None:
    """Renames a runner of tests that means the answer's function by its own name, as in `check(check)`."""
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(function))
        calls = [call for call in _calls(tree) if call.func.id == function.name]
        if asserts and len(calls) == 1 and function.name in _loads(function):
            function.name = calls[0].func.id = f"__drift_{function.name}__"


def _runners(tree: ast.Module) -> dict[str, ast.Call]:
    """Functions of the tests that the source calls once, as a statement of its own; with that call."""
    functions = {statement.name for statement in tree.body if isinstance(statement, ast.FunctionDef)}
    loads = _loads(tree)
    return {
        call.func.id: call
        for call in _calls(tree)
        if call.func.id in functions and loads.count(call.func.id) == 1
    }


def _calls(tree: ast.Module) -> Iterator[Any]:
    for statement in tree.body:
        if (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and isinstance(statement.value.func, ast.Name)
        ):
            yield statement.value


def _loads(tree: ast.AST) -> list[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return [node.id for node in nodes if isinstance(node.ctx, ast.Load)]


@dataclass(slots=True)
class _Marker:
    """Numbers the assertions and makes them report."""

    required: list[int] = field(default_factory=list)
    optional: list[int] = field(default_factory=list)
    num_tests: int = 0
    late: list[int] = field(default_factory=list)  # in functions that are called who knows how often
    aliases: dict[str, str] = field(default_factory=dict)  # parameter of the runner -> what it is called with

    def mark(self, tree: ast.Module, runners: Mapping[str, ast.Call]) -> list[ast.stmt]:
        """The statements of a source, with its assertions reporting.

        Args:
            tree: the source; changed.
            runners: its functions that are called once, with that call.
        """
        self.late = []
        body: list[ast.stmt] = []
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef) and statement.name in runners:
                given = zip(statement.args.args, runners[statement.name].args, strict=False)
                self.aliases = {name.arg: value.id for name, value in given if isinstance(value, ast.Name)}
                statement.body = [part for inner in statement.body for part in self._settled(inner)]
                self.aliases = {}
                body.append(statement)
            else:
                body += self._settled(statement)
        if self.late:
            body = [*_report("begin", [len(self.late)]), *body, *_report("settle", self.late)]
        return body

    def _settled(self, statement: ast.stmt) -> list[ast.stmt]:
        """The statement, after which its tests stand: an exception before its end leaves them open."""
        first = self.num_tests
        marked = self._block([statement], optional=False)
        tests = [test for test in range(first, self.num_tests) if test not in self.late]
        if not tests:
            return marked
        begin = _report("begin", [len(tests)]) if len(tests) > 1 else []
        return [*begin, *marked, *_report("settle", tests)]

    def _block(self, statements: Sequence[ast.stmt], optional: bool) -> list[ast.stmt]:
        return [part for statement in statements for part in self._statement(statement, optional)]

    def _statement(self, statement: ast.stmt, optional: bool) -> list[ast.stmt]:
        if isinstance(statement, ast.Assert):
            return self._assertion(statement, optional)
        first = self.num_tests
        for name, value in ast.iter_fields(statement):
            if not isinstance(value, list) or not value:
                continue
            if isinstance(value[0], ast.stmt):
                setattr(statement, name, self._block(value, optional or isinstance(statement, ast.If)))
            elif isinstance(value[0], ast.ExceptHandler | ast.match_case):
                for branch in value:
                    branch.body = self._block(branch.body, optional=True)
        if isinstance(statement, _DEFINITION):
            self.late += [test for test in range(first, self.num_tests) if test not in self.late]
        return [statement]

    def _assertion(self, statement: ast.Assert, optional: bool) -> list[ast.stmt]:
        try:
            constant = bool(ast.literal_eval(statement.test))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            constant = None
        if constant or self._compares_with_itself(statement.test):
            return [ast.Pass()]  # it holds for every answer
        number, self.num_tests = self.num_tests, self.num_tests + 1
        (self.optional if optional or constant is False else self.required).append(number)
        attempt = ast.Try(
            body=[statement],
            handlers=[ast.ExceptHandler(body=_report("fail", [number]))],
            orelse=_report("hold", [number]),
            finalbody=[],
        )
        is_open = ast.parse(f"__drift__.open({number})", mode="eval").body
        return [ast.If(test=is_open, body=[attempt], orelse=[])]

    def _compares_with_itself(self, test: ast.expr) -> bool:
        if not isinstance(test, ast.Compare) or len(test.ops) > 1 or not isinstance(test.ops[0], ast.Eq):
            return False
        left, right = copy.deepcopy((test.left, test.comparators[0]))
        for node in (*ast.walk(left), *ast.walk(right)):
            if isinstance(node, ast.Name):
                node.id = self.aliases.get(node.id, node.id)
        return ast.dump(left) == ast.dump(right)


def _report(what: str, numbers: Iterable[int]) -> list[ast.stmt]:
    return ast.parse(f"__drift__.{what}({', '.join(map(str, numbers))})").body


def prefix_code(prefix: str) -> str:
    """The code with which an answer starts: what follows the prefix's last fence, or all of it."""
    return prefix.rpartition(_FENCE)[2].partition("\n")[2] if _FENCE in prefix else prefix


def _helpers(prefix: str) -> list[ast.stmt]:
    """The statements of the prefix before its last definition, which is the one to be completed."""
    lines = prefix_code(prefix).split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(("def ", "async def ", "class ", "@"))]
    while len(starts) > 1 and lines[starts[-2]].startswith("@") and starts[-2] == starts[-1] - 1:
        del starts[-1]
    try:
        return ast.parse("\n".join(lines[: starts[-1]] if starts else [])).body
    except (SyntaxError, ValueError):
        return []


def _needed(helpers: Sequence[ast.stmt], names: set[str]) -> list[ast.stmt]:
    """The helpers that bind some names, and those that these need, in their order."""
    scopes = [_globals(ast.Module(body=[helper], type_ignores=[])) for helper in helpers]
    wanted, chosen = set(names), set()
    while found := {i for i, scope in enumerate(scopes) if i not in chosen and scope.bound & wanted}:
        chosen |= found
        wanted |= {name for i in found for name in scopes[i].free}
    return [helper for i, helper in enumerate(helpers) if i in chosen]


@dataclass(frozen=True, slots=True)
class _Globals:
    """Global names of a source: those it binds, and those it reads without binding them."""

    bound: set[str]
    free: set[str]


def _globals(tree: ast.Module) -> _Globals:
    top = symtable.symtable(ast.unparse(tree), "tests.py", "exec")
    bound, read = set(), set()
    tables = [top]
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is not top and not symbol.is_global():
                continue
            if symbol.is_assigned() or symbol.is_imported():
                bound.add(symbol.get_name())
            if symbol.is_referenced():
                read.add(symbol.get_name())
    return _Globals(bound, read - bound)


def _modules(tree: ast.AST) -> set[str]:
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {module.partition(".")[0] for module in modules}


def _refuse_foreign_modules(tree: ast.AST) -> None:
    foreign = sorted(_modules(tree) - set(sys.stdlib_module_names))
    if foreign:
        raise ValueError(f"the tests import {foreign}, and the sandbox has Python's standard library only")
