import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError, Problem
from drift.data import PromptTemplate
from drift.models.characters import MASK, character_tokenizer

CHAT = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</{{ turn.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def problem(prompt: str = "2+2?", demonstration: str | None = None, prefix: str = "") -> Problem:
    return Problem(prompt=prompt, answer="4", demonstration=demonstration, answer_prefix=prefix)


def template(chat: bool = False, system_prompt: str | None = None, max_length: int = 64) -> PromptTemplate:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    return PromptTemplate(tokenizer, system_prompt, max_length)


@pytest.mark.parametrize(
    ("chat", "system_prompt", "expected"),
    [
        (False, None, "2+2?"),
        (False, "Be brief.", "Be brief.\n2+2?"),
        (True, None, "<user>2+2?</user><assistant>"),
        (True, "Be brief.", "<system>Be brief.</system><user>2+2?</user><assistant>"),
        (True, "", "<user>2+2?</user><assistant>"),
    ],
)
def test_rendered_text(chat: bool, system_prompt: str | None, expected: str):
    rendering = template(chat, system_prompt)
    assert rendering.render(problem()) == expected
    ids = rendering.encode(problem(), "row 3")
    assert rendering.tokenizer.decode(ids) == expected
    assert len(ids) == len(expected) == rendering.num_tokens(problem())


@pytest.mark.parametrize(
    ("chat", "system_prompt", "expected"),
    [
        (False, None, "2+2?\nIt is "),
        (False, "Be brief.", "Be brief.\n2+2?\nIt is "),
        (True, None, "<user>2+2?</user><assistant>It is "),
        (True, "Be brief.", "<system>Be brief.</system><user>2+2?</user><assistant>It is "),
    ],
)
def test_the_answer_prefix_ends_the_prompt(chat: bool, system_prompt: str | None, expected: str):
    rendering, asked = template(chat, system_prompt), problem(prefix="It is ")
    assert rendering.render(asked) == expected
    ids = rendering.encode(asked, "row 3")
    assert rendering.tokenizer.decode(ids) == expected
    assert len(ids) == rendering.num_tokens(asked)


def test_the_answer_prefix_counts_and_may_not_hold_the_mask_token():
    with pytest.raises(ConfigError, match="has 11 tokens"):
        template(max_length=10).encode(problem(prefix="It is "), "row 3")
    with pytest.raises(ConfigError, match="holds the mask token"):
        template().encode(problem(prefix=f"It is {MASK}"), "row 3")


def test_an_answer_is_prefix_and_completion_without_special_tokens():
    rendering = template()
    ids = torch.tensor([rendering.tokenizer(text)["input_ids"] for text in ("four", "five")])
    ids[1, 2:] = rendering.tokenizer.pad_token_id
    problems = [problem(prefix="It is "), problem()]
    assert rendering.answers(ids, problems) == ["It is four", "fi"]
    with pytest.raises(ValueError, match=r"longer|shorter"):
        rendering.answers(ids, problems[:1])


def test_prompt_and_prefix_are_tokenised_as_one_text():
    """A token may hold the end of the prompt and the start of the prefix, as in a text that was never cut."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE({"a": 0, "\n": 1, "b": 2, "\nb": 3}, [("\n", "b")]))
    )
    rendering = PromptTemplate(tokenizer, None, 64)
    assert rendering.encode(problem("a", prefix="b"), "row 3") == [0, 3]


def test_the_chat_template_is_that_of_the_setting():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    assert (
        PromptTemplate(tokenizer, "Be brief.", 64, chat_template="none").render(problem())
        == "Be brief.\n2+2?"
    )
    given = PromptTemplate(tokenizer, None, 64, chat_template="Q: {{ messages[0].content }}")
    assert given.render(problem()) == "Q: 2+2?"


def test_a_chat_template_without_a_system_turn_refuses_a_system_prompt():
    text = "{% for turn in messages if turn.role == 'user' %}{{ turn.content }}{% endfor %}"
    PromptTemplate(character_tokenizer(), None, 64, chat_template=text)
    with pytest.raises(ConfigError, match=r"data\.system_prompt is 'Be brief\.': .*no system turn"):
        PromptTemplate(character_tokenizer(), "Be brief.", 64, chat_template=text)


def test_the_longest_prompt_fits_and_one_token_more_does_not():
    rendering = template(max_length=10)
    assert len(rendering.encode(problem("x" * 10), "row 3")) == 10
    with pytest.raises(ConfigError) as caught:
        rendering.encode(problem("x" * 11), "data.train (a.json) row 3")
    message = str(caught.value)
    assert message.startswith("data.train (a.json) row 3: its prompt has 11 tokens")
    assert "data.max_prompt_length is 10; raise it, or set data.long_prompts: drop" in message


def test_the_chat_template_counts_too():
    with pytest.raises(ConfigError, match="has 28 tokens"):
        template(chat=True, max_length=27).encode(problem(), "row 3")


def test_a_prompt_with_the_mask_token_is_refused():
    with pytest.raises(ConfigError, match=r"^row 3: its prompt holds the mask token '<\|mask\|>'.*drop"):
        template().encode(problem(f"what is {MASK}?"), "row 3")


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"^row 3: its prompt is empty"):
        template().encode(problem(""), "row 3")


def test_demonstrations_are_padded_to_their_length():
    rendering = template()
    ids = rendering.encode_demonstration(problem(demonstration="four"), 6, "row 3")
    assert ids[4:] == [0, 0]
    assert rendering.tokenizer.decode(ids[:4]) == "four"
    assert len(rendering.encode_demonstration(problem(demonstration="four"), 4, "row 3")) == 4


@pytest.mark.parametrize(
    ("demonstration", "message"),
    [
        (None, "row 3: it has no demonstration; choose a task that has, or unset demonstration_length"),
        ("five!", r"row 3: its demonstration has 5 tokens, data\.demonstration_length is 4; raise it"),
    ],
)
def test_demonstrations_that_cannot_be_used(demonstration: str | None, message: str):
    with pytest.raises(ConfigError, match=message):
        template().encode_demonstration(problem(demonstration=demonstration), 4, "row 3")


def test_a_demonstration_goes_on_from_the_answer_prefix():
    rendering = template()
    ids = rendering.encode_demonstration(problem(demonstration="four", prefix="It is "), 4, "row 3")
    assert rendering.tokenizer.decode(ids) == "four"
    with pytest.raises(ConfigError, match=r"^row 3: its demonstration repeats the answer prefix 'It is '"):
        rendering.encode_demonstration(problem(demonstration="It is four", prefix="It is "), 20, "row 3")


@pytest.mark.parametrize(
    ("chat_template", "ends"),
    [
        ("none", ["<|endoftext|>"]),
        # What follows the user's turn ends a turn; where that is no special token, nothing does.
        ("{{ messages[-1].content }}<|turn|>\n<|start|>assistant", ["<|endoftext|>", "<|turn|>"]),
        ("{{ messages[-1].content }}\n<|start|>assistant", ["<|endoftext|>"]),
        ("{{ messages[-1].content }}", ["<|endoftext|>"]),
        ("{{ messages[-1].content }}<think>", ["<|endoftext|>"]),
    ],
)
def test_what_ends_an_answer(chat_template: str, ends: list[str]):
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|turn|>"]})
    tokenizer.add_tokens("<think>")
    template = PromptTemplate(tokenizer, None, 100, chat_template=chat_template)
    assert tokenizer.convert_ids_to_tokens(template.end_token_ids) == ends
    letter, turn, padding = 5, tokenizer.convert_tokens_to_ids("<|turn|>"), tokenizer.pad_token_id
    completions = torch.tensor([[letter, letter], [letter, turn], [padding, padding]])
    assert template.finished(completions).tolist() == [False, "<|turn|>" in ends, True]
