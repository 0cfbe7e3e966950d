r"""Evaluation prompts among training prompts: the same text, the same but for its writing, or most of it.

Pure functions and an index over texts; what follows from a match is decided in `drift.data.guard`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NGRAM = 8  # words
_MIN_TEMPLATE = 3  # prompts that must share an n-gram before it can be the template

Kind = Literal["exact", "normalised", "overlap"]

# Curly quotes, the minus sign and dashes.
_CHARACTERS = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u2013": "-", "\u2014": "-"}
)
# Ways to write the same thing. What tells problems apart stays: operators, brackets, primes, decimal points.
_WRITINGS = [
    # Punctuation at the end of a word or a formula; in "1.5", "3:4" or a grid of dots it is something else.
    (re.compile(r"(?<=[^\W_]|[)\]}\"'$])[.?:]+(?=[\s)\]\"'$]|\\[)\]]|$)"), " "),
    # LaTeX: spacing, math delimiters and the size of brackets. A backslash before them makes a line break.
    (
        re.compile(r"(?<!\\)\\(?:[,;:!> ()\[\]]|(?:q?quad|left|right|displaystyle)(?![a-z]))|\\?\$|(?<=\w)~"),
        " ",
    ),
    (re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"([_^])\{(\w)\}"), r"\1\2"),
    # 1,000 and 1{,}000
    (re.compile(r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))"), ""),
]
# Chinese and Japanese put no spaces between words: there a character counts as one.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(
    rf"\d+(?:\.\d+)*|[{_UNSPACED}]|\\?[^\W\d_{_UNSPACED}]+"
    r"|(?<=\b[^\W\d_])'+(?![^\W\d_])"  # the primes of f'(x), not the apostrophe of don't
    r"|[^\w\s,;\"'`]|_"
)
_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a prompt is compared by."""

    text: str
    words: tuple[str, ...]  # of the normalised text; empty: only the text itself is compared
    ngrams: frozenset[int]  # hashes of its runs of NGRAM words


@dataclass(frozen=True, slots=True)
class Match:
    """An evaluation prompt that was found in a training prompt."""

    row: int  # the evaluation prompt's place in its set
    kind: Kind
    overlap: float  # share of the evaluation prompt's n-grams in the training prompt; 1 where they are equal


def words(text: str) -> tuple[str, ...]:
    r"""The words, numbers and signs of a text, however it is written.

    Case, whitespace, commas, quotes and the punctuation of sentences make no difference, nor do LaTeX spacing
    (`\,`, `\left`), math delimiters, `\dfrac` for `\frac`, `x^{2}` for `x^2` and separators of thousands.

    Args:
        text: a prompt.
    """
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS).casefold()
    for writing, same in _WRITINGS:
        text = writing.sub(same, text)
    return tuple(_WORD.findall(text))


def fingerprint(text: str, *, exact_only: bool = False) -> Fingerprint:
    """What a prompt is compared by.

    N-grams are of the text without drawn figures ([asy] code): problems that ask different things about one
    figure would share most of theirs.

    Args:
        text: the prompt.
        exact_only: whether it is compared as it stands only.
    """
    if exact_only:
        return Fingerprint(text, (), frozenset())
    found = words(text)
    told = words(_FIGURE.sub(" ", text)) if "[asy]" in text else found
    # As hashes they take a tenth of the memory; Python's have 64 bits, so that chance matches don't occur.
    ngrams = frozenset(map(hash, zip(*(told[start:] for start in range(NGRAM)), strict=False)))
    return Fingerprint(text, found, ngrams)


class PromptIndex:
    """Finds the prompts of an evaluation set in training prompts, in time that doesn't grow with the set.

    The overlap is that of PaLM (arXiv 2204.02311, section 8: contaminated is what has at least 70 % of its
    8-grams in the training data) with two departures. The n-grams must be found in one training prompt, which
    can then be named and left out. And n-grams that more than half of the set's prompts share don't count:
    they are the template (instructions, few-shot examples). Prompts of fewer than 8 words have none.

    Args:
        prompts: the evaluation set.
        threshold: least share of a prompt's n-grams, within (0, 1].
    """

    def __init__(self, prompts: Sequence[Fingerprint], threshold: float) -> None:
        self.threshold = threshold
        self.texts = [prompt.text for prompt in prompts]
        self._texts: dict[str, list[int]] = defaultdict(list)
        self._words: dict[tuple[str, ...], list[int]] = defaultdict(list)
        holders: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            self._texts[prompt.text].append(row)
            if prompt.words:
                self._words[prompt.words].append(row)
            for ngram in prompt.ngrams:
                holders[ngram].append(row)
        most = max(len(prompts) / 2, _MIN_TEMPLATE - 1)
        self._holders = {ngram: rows for ngram, rows in holders.items() if len(rows) <= most}
        self._num_ngrams = Counter(row for rows in self._holders.values() for row in rows)

    def matches(self, prompt: Fingerprint) -> list[Match]:
        """The evaluation prompts that a training prompt gives away, each under its strongest kind, by row.

        Args:
            prompt: the training prompt.
        """
        shared = Counter(row for ngram in prompt.ngrams for row in self._holders.get(ngram, ()))
        found: dict[int, Match] = {}
        for row, num in shared.items():
            overlap = num / self._num_ngrams[row]
            if overlap >= self.threshold:
                found[row] = Match(row, "overlap", overlap)
        # A text without words, such as a row of signs, is compared as it stands.
        for row in self._words.get(prompt.words, ()):
            found[row] = Match(row, "normalised", 1.0)
        for row in self._texts.get(prompt.text, ()):
            found[row] = Match(row, "exact", 1.0)
        return [found[row] for row in sorted(found)]
