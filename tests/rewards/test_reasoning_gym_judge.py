import pytest

from drift.rewards.reasoning_gym_judge import ForbiddenError, _require_harmless


@pytest.mark.parametrize(
    "text",
    ["[1, 'a', None, True]", "Integer(2)*Symbol('x')**2 + C", "sin(x)/sqrt(2) - exp(-x)", "x", "{1: (2, 3)}"],
)
def test_mathematics_is_harmless(text: str):
    _require_harmless(compile(text, "<string>", "eval"))


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "__import__('os')",
        "x.__class__",
        "x.subs(1, 2)",
        "sympy.preview(x)",
        "[__builtins__ for i in x]",
        "(lambda: [(lambda: os)() for i in x])()",
        "exec('1')",
        "globals()",
        "print(1)",
    ],
)
def test_other_names_are_not(text: str):
    with pytest.raises(ForbiddenError, match="an answer may not name"):
        _require_harmless(compile(text, "<string>", "eval"))


def test_modules_may_name_what_they_like():
    _require_harmless(compile("import os", __file__, "exec"))
    _require_harmless(compile("import os", "<frozen os>", "exec"))
