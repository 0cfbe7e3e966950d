import json
from collections import Counter
from pathlib import Path

import pytest

from drift.data.contamination import NGRAM, PromptIndex, fingerprint, words


def found(train: str, *evaluation: str, threshold: float = 0.95) -> list[tuple[int, str]]:
    index = PromptIndex([fingerprint(text) for text in evaluation], threshold)
    return [(match.row, match.kind) for match in index.matches(fingerprint(train))]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is Two plus two?", "what is\n  two plus two"),
        ("Find $x$, if $x + 1 = 2$.", "Find $x$ if $x+1=2$"),
        (r"Compute $\left( 1,\, 2 \right)$.", "Compute (1,2)"),
        (r"Compute \(\dfrac{1}{2}\).", r"Compute \frac{1}{2}."),
        (r"\[ a\quad b \]", "$$a b$$"),
        (r"Let \[z = c.\] Solve \(z.\)", "Let $z = c$. Solve $z$?"),
        ("$x^{2} + y_{i}$", "$x^2+y_i$"),
        ("It costs $5,000.", "It costs $5000"),
        ("It costs $5{,}000$.", "It costs 5000"),
        ("Janet\u2019s \u201cducks\u201d: 16 \u2212 3", 'Janet\'s "ducks" 16 - 3'),
        ("Figure~1 shows 5~cm", "Figure 1 shows 5 cm"),
        ("\uff21\uff22 two", "ab two"),
        ("f(2x)", "f(2 x)"),
    ],
)
def test_writings_of_one_prompt(one: str, other: str):
    assert words(one) == words(other)
    assert found(one, other) == [(0, "normalised")]
    assert found(one, one) == [(0, "exact")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Solve $z^4 + z^2 + 1 = 0$.", "Solve $z^4 - z^2 + 1 = 0$."),
        ("Find $f'(2)$.", "Find $f(2)$."),
        ("Find $5!$.", "Find $5$."),
        ("Add 1.5 and 2.", "Add 15 and 2."),
        ("(a+b)c", "a+(bc)"),
        ("[1, 2]", "[12]"),
        ("x_1", "x1"),
        ("...12...", "..12...."),
        ("1 . . 2", "1 . 2 ."),
        ("{[()]}", "[{()}]"),
        ("a line\\\\ break", "a line break"),
        (r"\leftarrow x", "arrow x"),
        (r"\quadratic", "ratic"),
    ],
)
def test_other_problems_are_not_the_same(one: str, other: str):
    assert words(one) != words(other)
    assert found(one, other) == []


def numbered(*numbers: int) -> str:
    return " ".join(f"w{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in numbers)


def test_the_overlap_is_the_share_of_the_evaluation_prompts_ngrams():
    # 27 words have 20 runs of 8; another last word changes one of them, another 9th word 8 of them.
    prompt = [*range(27)]
    last, ninth = [*prompt[:-1], 99], [*prompt[:8], 99, *prompt[9:]]
    index = PromptIndex([fingerprint(numbered(*prompt))], 0.5)
    for other, share in ((last, 19 / 20), (ninth, 12 / 20)):
        (match,) = index.matches(fingerprint(numbered(*other)))
        assert (match.kind, match.overlap) == ("overlap", pytest.approx(share))
    # What else the training prompt holds makes no difference.
    (match,) = index.matches(fingerprint(numbered(*range(200, 300), *prompt, *range(300, 400))))
    assert match.overlap == 1.0
    assert index.matches(fingerprint(numbered(*prompt[:17]))) != []  # 10 of 20 runs: at the threshold
    assert index.matches(fingerprint(numbered(*prompt[:16]))) == []  # 9 of 20


@pytest.mark.parametrize(("threshold", "hit"), [(0.95, True), (0.951, False), (1.0, False)])
def test_the_threshold(threshold: float, hit: bool):
    prompt = [*range(27)]
    assert bool(found(numbered(*prompt[:-1], 99), numbered(*prompt), threshold=threshold)) is hit


def test_the_ngrams_must_be_in_one_training_prompt():
    prompt = numbered(*range(40))
    index = PromptIndex([fingerprint(prompt)], 0.95)
    halves = [numbered(*range(24)), numbered(*range(16, 40))]
    assert [index.matches(fingerprint(half)) for half in halves] == [[], []]


def test_prompts_of_fewer_than_eight_words_are_compared_whole():
    short = numbered(*range(NGRAM - 1))
    assert found(f"{short} {numbered(99)}", short) == []
    assert found(short.upper(), short) == [(0, "normalised")]


def test_every_prompt_is_found_under_its_strongest_kind():
    text = numbered(*range(20))
    evaluation = [text, "else", text.upper(), "more", f"{text}?", "other", numbered(*range(19)), "last"]
    assert found(text, *evaluation) == [
        (0, "exact"),
        (2, "normalised"),
        (4, "normalised"),
        (6, "overlap"),
    ]


def test_signs_and_empty_texts_are_compared_as_they_stand():
    assert found("\u3002", "\u3002", "\u300c") == [(0, "exact")]
    assert found("", "", "?") == [(0, "exact")]
    assert found('""', "''") == []


def test_a_template_does_not_count():
    """Few-shot examples and instructions that most prompts of the set have in common."""
    shots, instruction = numbered(*range(300)), numbered(*range(300, 340))

    def prompt(*own: int) -> str:
        return f"{shots} {numbered(*own)} {instruction}"

    evaluation = [prompt(*range(400 + 9 * i, 409 + 9 * i)) for i in range(5)]
    assert found(prompt(*range(500, 509)), *evaluation) == []
    # The same prompt is found through its own words, though another one stands beside it.
    assert found(f"{evaluation[3]} {numbered(*range(600, 610))}", *evaluation) == [(3, "overlap")]
    # In few prompts, nobody can tell what the template is.
    assert found(prompt(*range(500, 509)), *evaluation[:2], threshold=0.9) == [(0, "overlap"), (1, "overlap")]


def test_figures_count_only_where_they_are_all_the_same():
    figure = f"[asy] {numbered(*range(200))} [/asy]"
    area, side = (f"{numbered(*range(300, 320), last)} {figure}" for last in (400, 500))
    assert found(area, side) == []
    assert found(area, area.upper().replace("[ASY]", "[asy]").replace("[/ASY]", "[/asy]")) == [
        (0, "normalised")
    ]


def test_exact_only():
    puzzle = ". ".join("123412341234")
    index = PromptIndex([fingerprint(puzzle, exact_only=True)], 0.1)
    assert index.matches(fingerprint(puzzle.replace(" ", ""), exact_only=True)) == []
    assert [m.kind for m in index.matches(fingerprint(puzzle, exact_only=True))] == ["exact"]


def test_languages_without_spaces_have_ngrams():
    text = "\u6c42\u4e00\u5143\u4e8c\u6b21\u65b9\u7a0b\u7684\u4e24\u4e2a\u6839\u4e4b\u548c"
    assert len(words(text)) == len(text)
    assert found(f"{text}\u518d\u6c42\u79ef", text) == [(0, "overlap")]


@pytest.mark.parametrize(
    ("train", "evaluation", "at_95", "at_85", "at_70"),
    [
        ("MATH_rldf", "MATH500", {"exact": 248}, {"exact": 248, "overlap": 1}, {"exact": 248, "overlap": 4}),
        ("MATH_train", "MATH500", {}, {}, {"overlap": 16}),
        ("MATH_train", "gsm8k_test", {}, {}, {}),
        ("MBPP_train", "MBPP", {}, {"overlap": 1}, {"overlap": 6}),
        ("MBPP_train", "HumanEval", {}, {}, {}),
    ],
)
def test_benchmark_files(shared: Path, train: str, evaluation: str, at_95: dict, at_85: dict, at_70: dict):
    def prints(name: str) -> list:
        rows = json.loads((shared / "data" / f"{name}.json").read_text())
        return [fingerprint(row["question"]) for row in rows]

    rows, prompts = prints(train), prints(evaluation)
    for threshold, expected in ((0.95, at_95), (0.85, at_85), (0.7, at_70)):
        index = PromptIndex(prompts, threshold)
        matches = [match for row in rows for match in index.matches(row)]
        # The strongest kind comes last, and stays.
        kinds = {m.row: m.kind for m in sorted(matches, key=lambda m: m.kind != "overlap")}
        assert Counter(kinds.values()) == expected
