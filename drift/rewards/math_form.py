r"""Which parts of two answers must be equal, where their form alone does not settle it.

math-verify is lenient about form: to it `1,2` is `(1,2)`, `5 \approx 6` is 5, and 36 cents are 36 dollars.
What a form means is decided here, from the text alone; what a formula is worth is left to math-verify.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Delimiters inside an answer would let it hold several formulas, of which only one had to be right.
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*(?=[()\[\]]|\\[{}])")
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\!)(?=\d{3}(?!\d))")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)")
_AND = re.compile(
    r"\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}|;|,\s*\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}"
)
_FULL_STOP = re.compile(r"(?<!\\right)(?<!\\left)\.$")  # "\boxed{18.}" ends a sentence; "\right." is LaTeX
_TEXT = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit)\s*"
_WORDS = re.compile(rf"{_TEXT}\{{([^{{}}\d]*[A-Za-z][^{{}}\d]*)\}}")
_WRAPPERS = re.compile(rf"{_TEXT}\{{|[{{}}()\s.]")
_UNIT = re.compile(rf"{_TEXT}\{{([^{{}}]*)\}}\s*(?:\^\s*\{{?\s*(\d)\s*\}}?)?$")
_NO_UNIT = re.compile(r"\b(?:not|no|wrong|and|or|but|maybe|incorrect|false)\b", re.IGNORECASE)
_RELATION = re.compile(
    r"\\(?:approx|sim|simeq|cong|neq?|not|to|(?:long)?(?:left)?rightarrow|(?:Left)?Rightarrow|implies|iff|equiv|"
    r"propto|ll|gg)(?![a-zA-Z])|[≈≠→⇒~]"
)
_LESS, _LESS_EQUAL = r"<", r"\\leq?(?:slant)?(?![a-zA-Z])|≤|<="
_MORE, _MORE_EQUAL = r">", r"\\geq?(?:slant)?(?![a-zA-Z])|≥|>="
_ORDER = re.compile(rf"({_LESS_EQUAL}|{_MORE_EQUAL}|{_LESS}|{_MORE})")
_OR = re.compile(r"\\(?:lor|vee|cup)(?![a-zA-Z])")
_MEMBER = re.compile(r"^[A-Za-z]\s*\\in(?![a-zA-Z])\s*")
_LABEL = re.compile(
    r"[A-Za-z](?:_\{?\w+\}?)?|[A-Za-z]\([A-Za-z]\)|\\[a-z]+(?:_\{?\w+\}?)?|\([A-Za-z](?:\s*,\s*[A-Za-z])+\)"
)
_NAME = re.compile(r"[A-Z]{2,4}")
_LAYOUT = re.compile(r"\\(?:[dt]?frac|sqrt|cdot|times|left|right|pi|[,;:!% ])")
_BASE = re.compile(r"\d_\{?(\d+)\}?")
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus)(?![a-zA-Z])")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPEN, _CLOSE = ("(", "[", "{", "\\{", "\\langle"), (")", "]", "}", "\\}", "\\rangle")
_UNITS = {
    **dict.fromkeys(("inch", "inche", "in"), "inch"),
    **dict.fromkeys(("foot", "feet", "ft"), "foot"),
    **dict.fromkeys(("yard", "yd"), "yard"),
    **dict.fromkeys(("mile", "mi"), "mile"),
    **dict.fromkeys(("millimeter", "millimetre", "mm"), "mm"),
    **dict.fromkeys(("centimeter", "centimetre", "cm"), "cm"),
    **dict.fromkeys(("meter", "metre", "m"), "m"),
    **dict.fromkeys(("kilometer", "kilometre", "km"), "km"),
    **dict.fromkeys(("second", "sec"), "second"),
    **dict.fromkeys(("minute", "min"), "minute"),
    **dict.fromkeys(("hour", "hr"), "hour"),
    "day": "day",
    **dict.fromkeys(("gram", "g"), "gram"),
    **dict.fromkeys(("kilogram", "kg"), "kg"),
    **dict.fromkeys(("pound", "lb"), "pound"),
    "cent": "cent",
    "dollar": "dollar",
    "degree": "degree",
    **dict.fromkeys(("radian", "rad"), "radian"),
}
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
Question = tuple[str, str]


def questions(gold: str, answer: str) -> list[Question] | None:
    """Pairs of formulas that must all be equal for the answers to be so; None where they cannot be.

    Args:
        gold: the ground truth, LaTeX.
        answer: what is judged, LaTeX.
    """
    gold, answer = _tidy(gold), _tidy(answer)
    if not gold or not answer:
        return None
    if gold == answer:
        return []
    if words := _WORDS.fullmatch(gold):
        return [] if _bare(words[1]) == _bare(answer) else None
    if _says_other_things(gold, answer):
        return None
    gold, answer = _MEMBER.sub("", gold), _MEMBER.sub("", answer)
    if not _ORDER.search(gold) and _ORDER.search(answer):
        answer = _intervals(answer) or answer
    elif _ORDER.search(gold) and not _ORDER.search(answer):
        gold = _intervals(gold) or gold
    return _of_equations(gold, answer)


def _tidy(text: str) -> str:
    text = " ".join(_DELIMITERS.sub(" ", text).split()).replace("°", "^\\circ")
    text = _AND.sub(",", _THOUSANDS.sub("", _SIZES.sub("", text)))
    return _FULL_STOP.sub("", text).strip()


def _bare(words: str) -> str:
    return _WRAPPERS.sub("", words).casefold()


def _says_other_things(gold: str, answer: str) -> bool:
    """Whether relations, bases, units or words forbid that the answers are equal."""
    if set(_RELATION.findall(answer)) - set(_RELATION.findall(gold)):
        return True
    bases = _BASE.findall(gold), _BASE.findall(answer)
    if bases[1] and bases[0] != bases[1]:
        return True
    units = _unit(gold), _unit(answer)
    if units[0] and units[1] and units[0] != units[1]:
        return True
    return any(_NO_UNIT.search(text) for text in re.findall(rf"{_TEXT}\{{([^{{}}]*)\}}", answer))


def _unit(text: str) -> tuple[str, str] | None:
    """The unit, and its power; None where there is none, or one that isn't known here."""
    if text.startswith("\\$"):
        return "dollar", "1"
    if text.endswith(("^\\circ", "^{\\circ}")):
        return "degree", "1"
    found = _UNIT.search(text)
    if found is None:
        return None
    *powers, name = found[1].strip().strip(".").lower().split() or [""]
    power = found[2] or "".join(_POWERS.get(word.strip("."), "?") for word in powers) or "1"
    unit = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
    return (unit, power) if unit and power in "123" else None


def _intervals(text: str) -> str | None:
    r"""`x < 2 \text{ or } x > 5` as a union of intervals; None where it is none in one letter."""
    parts = [part for found in _split(text, ",") for part in _OR.split(found)]
    found = [_interval(part.strip()) for part in parts]
    letters = {word for part in parts for word in re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", part)}
    if None in found or (len(parts) > 1 and len(letters) != 1):
        return None
    return " \\cup ".join(interval for interval in found if interval)


def _interval(text: str) -> str | None:
    r"""`2 < x \le 5` as an interval; None where it is no such inequality in one letter."""
    parts = [part.strip() for part in _ORDER.split(text)]
    signs = parts[1::2]
    if signs and all(">" in sign or "g" in sign or "≥" in sign for sign in signs):
        parts = parts[::-1]
    elif any(">" in sign or "g" in sign or "≥" in sign for sign in signs):
        return None
    is_open = [sign in "<>" for sign in parts[1::2]]
    ends = parts[0::2]
    if len(ends) == 3 and ends[1].isalpha() and len(ends[1]) == 1:
        return f"{'(' if is_open[0] else '['}{ends[0]},{ends[2]}{')' if is_open[1] else ']'}"
    if len(ends) == 2 and ends[0].isalpha() and len(ends[0]) == 1:
        return f"(-\\infty,{ends[1]}{')' if is_open[0] else ']'}"
    if len(ends) == 2 and ends[1].isalpha() and len(ends[1]) == 1:
        return f"{'(' if is_open[0] else '['}{ends[0]},\\infty)"
    return None


def _of_equations(gold: str, answer: str) -> list[Question] | None:
    label, *gold_sides = _split(gold, "=")
    if gold_sides and not (len(gold_sides) == 1 and _LABEL.fullmatch(label)):
        if len(gold_sides) > 1 or "=" in answer:
            return [(gold, answer)]
        # An equation is more than a value with a name: to math-verify its right side would do.
        return None if _has_variables(label) else [(gold_sides[0] if _has_letters(label) else label, answer)]
    if gold_sides and len(sides := _split(answer, "=")) > 1 and not any(map(_LABEL.fullmatch, sides)):
        return [(gold, answer)]
    value = gold_sides[0] if gold_sides else label
    name = label if gold_sides else None
    items: list[str] = []
    asked: list[Question] = []
    for item in _split(answer, ","):
        sides = _without_label(_split(item, "="), name, keep_names=_has_letters(value))
        if not sides:
            return None
        items.append(sides[0])
        asked += [(sides[0], side) for side in sides[1:]]
    main = _of_groups(value, ", ".join(items) if len(items) > 1 else items[0])
    return None if main is None else [*main, *asked]


def _without_label(sides: list[str], name: str | None, *, keep_names: bool) -> list[str]:
    """The sides of an equation that are values, without the name of what is asked; none where it is wrong."""
    if len(sides) < 2:
        return sides
    if _LABEL.fullmatch(sides[-1]) and not _LABEL.fullmatch(sides[0]):
        sides = sides[::-1]
    if _LABEL.fullmatch(sides[0]):
        wrong = name is not None and len(name) == len(sides[0]) == 1 and name != sides[0]
        return [] if wrong else sides[1:]
    # "a + b = 6" names what is asked where the answer is a number; "5 = 6" does not.
    return sides[1:] if not keep_names and _has_letters(sides[0]) else sides


def _has_letters(text: str) -> bool:
    return bool(re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text)))


def _has_variables(text: str) -> bool:
    """Whether there is a letter that is no part of a name such as AB, of a number or of its layout."""
    return bool(re.search("[A-Za-z]", _LAYOUT.sub("", text))) and not _NAME.fullmatch(text)


def _of_groups(gold: str, answer: str) -> list[Question] | None:
    ours, theirs = _group(gold), _group(answer)
    if _SET_OPERATION.search(gold) or _SET_OPERATION.search(answer):
        return [(gold, answer)]
    if ours is None or ours.is_set:
        # A list or a set, in any order, or a single value: never a tuple or an interval.
        return None if theirs is not None and not theirs.is_set else [(gold, answer)]
    if theirs is None or (ours.ends, len(ours.items)) != (theirs.ends, len(theirs.items)):
        return None
    return list(zip(ours.items, theirs.items, strict=True))


@dataclass(frozen=True, slots=True)
class _Group:
    """Several items between brackets."""

    ends: tuple[str, str]
    items: list[str]

    @property
    def is_set(self) -> bool:
        return self.ends == ("\\{", "\\}")


def _group(text: str) -> _Group | None:
    tokens = _TOKEN.findall(text)
    if not tokens or tokens[0] not in _OPEN or tokens[0] == "{" or tokens[-1] not in _CLOSE:
        return None
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0 and i < len(tokens) - 1:
            return None
    items = _split("".join(tokens[1:-1]).strip(), ",", whole_numbers=False)
    return _Group((tokens[0], tokens[-1]), items) if len(items) > 1 else None


def _split(text: str, separator: str, *, whole_numbers: bool = True) -> list[str]:
    """The parts between separators outside of all brackets, where the comma of 58,500 separates nothing."""
    if separator == "," and whole_numbers and not re.search(r"[(\[]|\\{", text):
        text = _GROUPED.sub(lambda number: number[0].replace(",", ""), text)
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if token == separator and depth <= 0 and not parts[-1].endswith(("<", ">", "!", ":")):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]
