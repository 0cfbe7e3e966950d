import copy
import json
import pickle
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from drift.contract import ConfigError, Problem
from drift.rewards import MathReward, extract_boxed


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    reward = MathReward()
    yield reward
    reward.close()


def judge(reward: MathReward, pairs: list[tuple[str, str]]) -> list[float]:
    """Rewards of (ground truth, completion) pairs."""
    problems = [Problem(prompt="is it \\boxed{0}?", answer=gold) for gold, _ in pairs]
    return reward([completion for _, completion in pairs], problems).tolist()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} }", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # the escaped brace is never closed
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{1} and \boxed{2", None),  # cut off: the last box is what counts
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        ("5", None),
        ("", None),
        ("\\boxed{" * 50_000, None),
        ("\\boxed{" + "{" * 200_000, None),
        ("\x00\ud800\\boxed{\x00}", "\x00"),
    ],
)
def test_extract_boxed(text: str, answer: str | None):
    assert extract_boxed(text) == answer


def test_equal_answers(reward: MathReward):
    pairs = [
        ("118", "118"),
        ("118", " 118 "),
        ("118", "$118$"),
        ("118", r"\(118\)"),
        ("118", "118."),
        ("10,080", "10080"),
        ("32348", "$32,348"),
        (r"\$32,348", "32348"),
        (r"50\%", "50"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\frac43", r"\dfrac{4}{3}"),
        (r"\frac43", "4/3"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
        (r"\text{(C)}", "C"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"x \in [2,5]", "[2,5]"),
        ("5", "x = 5"),
        ("p - q", "-q+p"),
        ("1,2", "2, 1"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}"),
    ]
    rewards = judge(reward, [(gold, f"It is \\boxed{{{answer}}}.") for gold, answer in pairs])
    assert [pair for pair, equal in zip(pairs, rewards, strict=True) if not equal] == []


def test_unequal_answers(reward: MathReward):
    pairs = [
        ("1,2", r"\boxed{12}"),
        ("12", r"\boxed{1,2}"),
        ("123", r"\boxed{1 2 3}"),
        ("5", r"\boxed{5 or 6}"),
        ("5", r"\boxed{5$ or $6}"),  # two formulas in one box
        ("5", r"\boxed{6$ or $5}"),
        ("5", r"\boxed{6\) or \(5}"),
        ("5", r"\boxed{4, 5, 6}"),
        ("5", r"\boxed{5}, or \boxed{6}"),
        ("5", "5"),
        ("5", "The answer is $5$."),
        ("5", r"\boxed{}"),
        ("5", r"\boxed{\text{any}}"),
        ("5", r"\boxed{\infty}"),
        ("5", r"\boxed{nan}"),
        ("5", "\\boxed{5\x00}"),
        ("5", "\\boxed{\ud800}"),
        ("5", r"\boxed{5\\}"),
        ("p-q", r"\boxed{q-p}"),
        ("[2,5]", r"\boxed{(2,5)}"),
        (r"\text{(C)}", r"\boxed{\text{(B)}}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}"),
        ("5", "\\boxed{5" + "+0" * 100_000 + "}"),
        ("0", ""),  # the prompt of the problem holds \boxed{0}
        ("", ""),
        ("", r"\boxed{}"),
    ]
    rewards = judge(reward, pairs)
    assert [pair for pair, equal in zip(pairs, rewards, strict=True) if equal] == []


def test_identical_strings_need_no_judge(monkeypatch: pytest.MonkeyPatch):
    asked = []
    reward = MathReward()
    monkeypatch.setattr(reward._pool, "judge", lambda pairs: asked.extend(pairs) or [True] * len(pairs))
    pairs = [("odd $ thing", r"\boxed{ odd $ thing }"), ("1", r"\boxed{2}"), ("1", r"\boxed{2}"), ("1", "1")]
    assert judge(reward, pairs) == [1.0, 1.0, 1.0, 0.0]
    assert asked == [[("1", "2")]]  # and equal pairs only one
    assert judge(reward, [("1", "\\boxed{" + "1+0" * 500 + "}")]) == [0.0]
    assert len(asked) == 1  # too long to be an answer


def test_parts_of_an_answer_that_hang_cost_its_time_once():
    reward = MathReward(timeout_seconds=1.0, num_workers=1)
    assert judge(reward, [("5", r"\boxed{4+1}")]) == [1.0]
    started = time.monotonic()
    tower = " = ".join(f"9^{{9^{{9^{{{n}}}}}}}" for n in range(9, 40))
    assert judge(reward, [("5", f"\\boxed{{5 = {tower}}}")]) == [0.0]
    assert time.monotonic() - started < 5  # 31 parts, of which each would take for ever
    reward.close()


def test_an_answer_that_hangs_costs_itself_only():
    reward = MathReward(timeout_seconds=1.0, num_workers=1)
    started = time.monotonic()
    pairs = [("5", r"\boxed{4+1}"), ("5", r"\boxed{9^{9^{9^9}}}"), ("6", r"\boxed{4+2}")]
    assert judge(reward, pairs) == [1.0, 0.0, 1.0]
    assert time.monotonic() - started < 30  # two starts of a judge, and 1 s
    reward.close()


def test_copies_carry_the_settings_alone():
    reward = MathReward(timeout_seconds=7.0, num_workers=1)
    assert judge(reward, [("5", r"\boxed{4+1}")]) == [1.0]
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert (twin.timeout_seconds, twin.num_workers) == (7.0, 1)
        assert twin._pool is not reward._pool
    reward.close()
    assert judge(reward, [("5", r"\boxed{4+1}")]) == [1.0]  # closing is not the end
    reward.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds=0 "),
        ({"timeout_seconds": -1.0}, "timeout_seconds=-1.0 "),
        ({"timeout_seconds": float("nan")}, "timeout_seconds=nan "),
        ({"timeout_seconds": float("inf")}, "timeout_seconds=inf "),
        ({"num_workers": 0}, "num_workers=0 "),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        MathReward(**settings)


@pytest.mark.parametrize("name", ["MATH500.json", "gsm8k_test.json"])
def test_every_ground_truth_equals_itself(shared: Path, reward: MathReward, name: str):
    rows = json.loads((shared / "data" / name).read_text())
    golds = [str(row["ground_truth_answer"]) for row in rows]
    completions = [f"So it is \\[\\boxed{{ {gold}. }}\\]" for gold in golds]
    rewards = judge(reward, list(zip(golds, completions, strict=True)))
    assert [gold for gold, equal in zip(golds, rewards, strict=True) if not equal] == []
    # The text is the same: that the judge reads every one of them, it must be asked for.
    different = list(dict.fromkeys(golds))
    verdicts = reward._pool.judge([[(gold, gold)] for gold in different])
    assert [gold for gold, equal in zip(different, verdicts, strict=True) if not equal] == []


def table() -> list[tuple[str, str, str]]:
    lines = Path(__file__).with_name("math_answers.tsv").read_text(encoding="utf-8").splitlines()
    rows = [tuple(line.split("\t")) for line in lines if not line.startswith("#")]
    assert {len(row) for row in rows} == {3}
    return rows


def test_the_table_of_answers(reward: MathReward):
    rows = table()
    rewards = judge(reward, [(gold, f"\\boxed{{{answer}}}") for gold, answer, _ in rows])
    wrong = [row for row, equal in zip(rows, rewards, strict=True) if (row[2] == "equal") != bool(equal)]
    assert wrong == []
    assert len(rows) >= 300
    assert {row[2] for row in rows} == {"equal", "unequal"}


def test_the_table_is_of_real_answers(shared: Path):
    golds = {row["ground_truth_answer"] for row in json.loads((shared / "data" / "MATH500.json").read_text())}
    assert len({gold for gold, _, _ in table()} & golds) >= 80


def test_neighbouring_ground_truths_differ(shared: Path, reward: MathReward):
    rows = json.loads((shared / "data" / "gsm8k_test.json").read_text())
    golds = [str(row["ground_truth_answer"]) for row in rows[:300]]
    pairs = [(gold, other) for gold, other in pairwise(golds) if gold != other]
    assert sum(judge(reward, [(gold, f"\\boxed{{{other}}}") for gold, other in pairs])) == 0
