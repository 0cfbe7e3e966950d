import json
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from drift.rewards.math_judge import as_formula
from drift.rewards.math_workers import JUDGE_COMMAND


@pytest.mark.parametrize(
    ("answer", "formula"),
    [
        ("5", "$5$"),
        (" $5$ ", "$5$"),
        (r"\(5\)", "$5$"),
        (r"\[5\]", "$5$"),
        ("1$ or $2", "$1 or 2$"),
        (r"\$5", r"$\$5$"),
        ("18.", "$18$"),
        ("1.5", "$1.5$"),
        (r"\left\{ x \right.", r"$\left\{ x \right.$"),
        ("a\nb", "$a b$"),
        (r"1 \\[4pt] 2", r"$1 \\[4pt] 2$"),  # a line break with a gap, no delimiter
    ],
)
def test_an_answer_becomes_one_formula(answer: str, formula: str):
    assert as_formula(answer) == formula


def talk(*questions: dict, command: tuple[str, ...] = JUDGE_COMMAND, timeout: float = 60) -> list[dict]:
    """What a judge says to the questions, its greeting first, until it ends."""
    lines = "".join(json.dumps({"timeout_seconds": 20.0, **question}) + "\n" for question in questions)
    judge = subprocess.run(
        command, input=lines, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False
    )
    return [json.loads(line) for line in judge.stdout.splitlines()]


def test_one_line_an_answer_and_an_end():
    replies = talk(
        {"gold": "5", "answer": "4+1"}, {"gold": "5", "answer": "4"}, {"gold": "5", "answer": "\ud800"}
    )
    assert replies == [{"ready": True}, {"equal": True}, {"equal": False}, {"equal": False}]


def test_what_libraries_print_or_raise_stays_out_of_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in = """
        print("loading")
        LatexExtractionConfig = object
        parse = lambda text, *_, **settings: print("parsing") or text
        verify = lambda gold, answer, **settings: {"$1$": True, "$good$": True, "$bad$": False}[answer]
    """
    (tmp_path / "math_verify.py").write_text(dedent(stand_in))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    replies = talk(*({"gold": "", "answer": answer} for answer in ("good", "raises KeyError", "bad", "good")))
    assert replies == [{"ready": True}] + [{"equal": equal} for equal in (True, False, False, True)]


def test_without_math_verify_it_says_so():
    # -S leaves out site-packages.
    (greeting,) = talk(command=(sys.executable, "-S", *JUDGE_COMMAND[1:]))
    assert "math_verify" in greeting["error"]


def test_what_hangs_or_crashes_is_not_equal_and_costs_no_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in = """
        import os, time
        time.sleep(1)
        LatexExtractionConfig = object
        parse = lambda text, *_, **settings: text
        actions = {"$hang$": lambda: sum(range(10**12)), "$crash$": os.abort}
        verify = lambda gold, answer, **settings: answer == "$1$" or actions[answer]()
    """
    (tmp_path / "math_verify.py").write_text(dedent(stand_in))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = time.monotonic()
    answers = ["crash"] * 20 + ["1", "hang", "1"]
    replies = talk(*({"gold": "", "answer": answer, "timeout_seconds": 0.5} for answer in answers))
    expected = [False] * 20 + [True, False, True]
    assert replies == [{"ready": True}] + [{"equal": equal} for equal in expected]
    assert time.monotonic() - started < 10  # 21 new starts would take 21 s


def test_it_loads_neither_torch_nor_drift():
    script = JUDGE_COMMAND[-1]
    program = (
        "import runpy, sys; sys.stdin.close(); sys.stdin = iter(())\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
        "assert not {'torch', 'drift'} & {name.partition('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-P", "-c", program], cwd=Path(script).parent, check=True, timeout=60)
