"""Chat templates: the tokenizer's own, the one that a family of policies was tuned with, or the user's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError

# What the instruction-tuned checkpoints of a family expect, by config.json's model_type. Dream was made from
# a Qwen2 model and keeps its habit of a default system turn where none is given.
FAMILY_TEMPLATES = {
    "llada": (
        "{{ '<|startoftext|>' }}"
        "{% for turn in messages %}"
        "{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\n\n' ~ turn.content ~ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "Dream": (
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}"
        "{% for turn in messages %}"
        "{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
_SYSTEM, _USER = "a probe of the system turn", "a probe of the user turn"


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja text, and whose it is, in words."""

    text: str
    whose: str

    def render(self, tokenizer: PreTrainedTokenizerFast, user: str, system: str | None) -> str:
        """The conversation as text, up to where the policy's turn starts.

        Args:
            tokenizer: names the special tokens that the text may speak of.
            user: content of the user's turn.
            system: content of the system turn; None or empty: there is none.
        """
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        text = tokenizer.apply_chat_template(
            turns, chat_template=self.text, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text

    def turn_end(self, tokenizer: PreTrainedTokenizerFast) -> int | None:
        """The special token that ends a turn; None where what follows a turn is no such token."""
        behind = self.render(tokenizer, _USER, None).rpartition(_USER)[2]
        ids: Any = tokenizer(behind, add_special_tokens=False)["input_ids"]
        known = tokenizer.added_tokens_decoder
        return ids[0] if ids and ids[0] in known and known[ids[0]].special else None


def find_chat_template(
    setting: str, tokenizer: PreTrainedTokenizerFast, family: str | None
) -> ChatTemplate | None:
    """The chat template to prompt with; None: the bare text.

    Args:
        setting: `auto`: the tokenizer's, or else that of the family where the tokenizer has the special
            tokens it is made of; `none`; a file; or a jinja text.
        tokenizer: of the policy.
        family: model_type of the policy's config.json; None: not known.

    Raises:
        ConfigError: where the setting is none of these.
    """
    if setting == "none":
        return None
    if setting != "auto":
        return _given(setting)
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise ConfigError(
                f"data.chat_template is 'auto': the tokenizer has chat templates {sorted(own)} and none is "
                "called default; give one as a file"
            )
        own = own["default"]
    if own:
        return ChatTemplate(own, "the tokenizer's chat template")
    known = FAMILY_TEMPLATES.get(family or "")
    if known is not None and set(re.findall(r"<\|\w+\|>", known)) <= set(tokenizer.added_tokens_encoder):
        return ChatTemplate(known, f"the chat template of {family}")
    return None


def _given(setting: str) -> ChatTemplate:
    if "{{" in setting or "{%" in setting:
        return ChatTemplate(setting, "the chat template")
    file = Path(setting).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"data.chat_template is {setting!r}: there is no such file, and it is no jinja text; give auto, "
            "none, a .jinja file or the text itself"
        )
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"), f"the chat template in {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template is {setting!r}: it cannot be read ({error}); it must be a UTF-8 text file"
        ) from error


def require_usable(
    template: ChatTemplate, setting: str, tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> None:
    """Raises ConfigError where a chat template is no jinja, or leaves out the user's or the system's turn.

    Args:
        template: to be tried.
        setting: what data.chat_template is.
        tokenizer: of the policy.
        system_prompt: what data.system_prompt is.
    """
    given = f"data.chat_template is {setting!r}: {template.whose}"
    fix = "correct it, or set data.chat_template to none or to another file"
    try:
        whole = _USER in template.render(tokenizer, _USER, None)
    except Exception as error:  # a template is a program: it may fail in any way
        raise ConfigError(f"{given} cannot be used ({_reason(error)}); {fix}") from error
    if not whole:
        raise ConfigError(f"{given} leaves out the user's turn; {fix}")
    if not system_prompt:
        return
    try:
        problem = "" if _SYSTEM in template.render(tokenizer, _USER, _SYSTEM) else "it leaves it out"
    except Exception as error:
        problem = _reason(error)
    if problem:
        raise ConfigError(
            f"data.system_prompt is {system_prompt!r}: {template.whose} takes no system turn ({problem}); "
            "unset it and put its text into the question, or choose another data.chat_template"
        )


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    place = f" in line {line}" if line is not None else ""
    return f"{type(error).__name__}{place}: {getattr(error, 'message', None) or error}"
