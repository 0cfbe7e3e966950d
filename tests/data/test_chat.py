import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError
from drift.data.chat import FAMILY_TEMPLATES, ChatTemplate, find_chat_template, require_usable
from drift.models.characters import character_tokenizer

LLADA = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DREAM = ["<|im_start|>", "<|im_end|>"]
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ messages[0].content }}"
)


def tokenizer(*special: str, chat_template: object = None) -> PreTrainedTokenizerFast:
    made = character_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = chat_template
    return made


def rendered(
    setting: str, made: PreTrainedTokenizerFast, family: str | None, system: str | None = None
) -> str:
    found = find_chat_template(setting, made, family)
    assert found is not None
    require_usable(found, setting, made, system)
    return found.render(made, "2+2?", system)


def refused(setting: str, made: PreTrainedTokenizerFast, system: str | None, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(setting, made, None, system)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value} does not say {missing}"
    assert "\n" not in str(caught.value).replace(setting, "")


def test_llada():
    made = tokenizer(*LLADA)
    user = "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    end = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert rendered("auto", made, "llada") == f"<|startoftext|>{user}{end}"
    system = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    text = rendered("auto", made, "llada", "Be brief.")
    assert text == f"<|startoftext|>{system}{user}{end}"
    # The text begins with its first token already: no second one is put before it.
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert made.convert_ids_to_tokens(ids).count("<|startoftext|>") == 1


def test_dream_has_a_system_turn_of_its_own_where_none_is_given():
    made = tokenizer(*DREAM)
    rest = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    own = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert rendered("auto", made, "Dream") == own + rest
    given = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert rendered("auto", made, "Dream", "Be brief.") == given + rest


def test_the_generation_prompt_is_written_only_where_it_is_asked_for():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for family, special, end in (("llada", LLADA, "b<|eot_id|>"), ("Dream", DREAM, "b<|im_end|>\n")):
        made = tokenizer(*special)
        text = made.apply_chat_template(turns, chat_template=FAMILY_TEMPLATES[family], tokenize=False)
        assert text.endswith(end)


@pytest.mark.parametrize(
    ("special", "family", "applies"),
    [
        (LLADA, "llada", True),
        (LLADA[1:], "llada", False),
        (LLADA[:-1], "llada", False),
        (DREAM, "llada", False),
        (DREAM, "Dream", True),
        (DREAM[:1], "Dream", False),
        (LLADA + DREAM, None, False),
        (LLADA + DREAM, "other", False),
    ],
)
def test_a_familys_template_needs_its_special_tokens(special: list[str], family: str | None, applies: bool):
    assert (find_chat_template("auto", tokenizer(*special), family) is not None) == applies


def test_the_tokenizers_own_template_comes_first():
    made = tokenizer(*LLADA, chat_template="{{ bos_token }}own {{ messages[0].content }}")
    made.bos_token = "<|startoftext|>"
    assert rendered("auto", made, "llada") == "<|startoftext|>own 2+2?"
    assert find_chat_template("none", made, "llada") is None


def test_of_several_templates_the_default_one():
    several = {"default": "d {{ messages[0].content }}", "tool_use": "t"}
    assert rendered("auto", tokenizer(chat_template=several), None) == "d 2+2?"
    del several["default"]
    refused("auto", tokenizer(chat_template=several), None, "data.chat_template is 'auto'", "['tool_use']")


def test_a_file_or_a_text(tmp_path: Path):
    made, text = tokenizer(*LLADA, chat_template="own"), "Q: {{ messages[-1].content }}"
    (tmp_path / "mine.jinja").write_text(text)
    assert rendered(text, made, "llada") == "Q: 2+2?"
    assert rendered(str(tmp_path / "mine.jinja"), made, "llada") == "Q: 2+2?"


def test_what_is_no_setting(tmp_path: Path):
    file = tmp_path / "mine.jinja"
    refused(str(file), tokenizer(), None, "data.chat_template is", str(file), "no such file", "auto")
    refused("chatml", tokenizer(), None, "data.chat_template is 'chatml'", "no jinja text")
    refused(str(tmp_path), tokenizer(), None, "no such file")
    file.write_bytes(b"\xff\xfe\x00{{")
    refused(str(file), tokenizer(), None, "data.chat_template is", str(file), "cannot be read", "UTF-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{{ messages[0].content }", ["TemplateSyntaxError in line 2"]),
        ("{% for turn in messages %}{{ turn.content }}", ["TemplateSyntaxError in line 1", "endfor"]),
        ("{{ messages[7].content.text }}", ["UndefinedError"]),
        ("{{ 1 + 'a' }}", ["TypeError"]),
        ("{{ raise_exception('not me') }}", ["not me"]),
        ("{{ 'always this' }}", ["leaves out the user's turn"]),
    ],
)
def test_a_bad_template_is_named_before_anything_is_rendered(tmp_path: Path, text: str, words: list[str]):
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    refused(
        str(file), tokenizer(), None, f"data.chat_template is {str(file)!r}", *words, "set data.chat_template"
    )
    refused(
        "auto", tokenizer(chat_template=text), None, "data.chat_template is 'auto': the tokenizer's", *words
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NO_SYSTEM, "System role not supported"),
        ("{{ messages[-1].content }}", "it leaves it out"),
    ],
)
def test_a_system_prompt_needs_a_system_turn(text: str, words: str):
    made = tokenizer(chat_template=text)
    assert rendered("auto", made, None) == "2+2?"
    assert rendered("auto", made, None, "") == "2+2?"
    refused(
        "auto", made, "Be brief.", "data.system_prompt is 'Be brief.'", "no system turn", words, "unset it"
    )


def test_a_template_is_kept_from_the_machine():
    made = tokenizer()
    text = "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="SecurityError"):
        require_usable(ChatTemplate(text, "it"), "x", made, None)


def test_the_special_tokens_of_the_templates():
    found = {family: set(re.findall(r"<\|\w+\|>", text)) for family, text in FAMILY_TEMPLATES.items()}
    assert found == {"llada": set(LLADA), "Dream": set(DREAM)}
