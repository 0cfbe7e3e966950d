"""From a problem to the token ids that the policy is prompted with, and from its completions to answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError, Problem
from drift.data.chat import find_chat_template, require_usable


class PromptTemplate:
    """Renders and tokenises prompts: a user turn where there is a chat template, else the bare text.

    A problem's answer prefix stands at the end of its prompt, where the policy's turn starts (in a bare text:
    on a line of its own). Prompt and prefix are tokenised as one text, and the completion is decoded alone,
    so a prefix should end where no token would go on, such as at the end of a line.

    Args:
        tokenizer: of the policy.
        system_prompt: put before every prompt, as a system turn where there is a chat template.
        max_length: longest prompt in tokens.
        mask_token_id: of the policy: not every tokenizer says which of its tokens is the mask. None: it does.
        chat_template: `auto`, `none`, a file, or a jinja text, as `find_chat_template` takes it.
        family: model_type of the policy's config.json; None: not known.

    Raises:
        ConfigError: where the chat template cannot be used, or takes no system turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        system_prompt: str | None,
        max_length: int,
        mask_token_id: int | None = None,
        chat_template: str = "auto",
        family: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.mask_token_id = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
        self.chat = find_chat_template(chat_template, tokenizer, family)
        if self.chat is not None:
            require_usable(self.chat, chat_template, tokenizer, system_prompt)
        ends = [tokenizer.pad_token_id, tokenizer.eos_token_id]
        ends.append(None if self.chat is None else self.chat.turn_end(tokenizer))
        # Tokens that end an answer, padding among them.
        self.end_token_ids = sorted({token for token in ends if isinstance(token, int)})

    @property
    def added_chat_template(self) -> str | None:
        """The jinja text that prompts are made with; None where it is the tokenizer's own."""
        if self.chat is None or self.chat.text == self.tokenizer.chat_template:
            return None
        return self.chat.text

    def render(self, problem: Problem) -> str:
        """The text that the policy is prompted with, answer prefix included."""
        if self.chat is not None:
            return (
                self.chat.render(self.tokenizer, problem.prompt, self.system_prompt) + problem.answer_prefix
            )
        parts = (self.system_prompt, problem.prompt, problem.answer_prefix)
        return "\n".join(part for part in parts if part)

    def answers(self, completion_ids: Tensor, problems: Sequence[Problem]) -> list[str]:
        """What the policy answered: the answer prefix and the completion, without special tokens.

        Args:
            completion_ids: [N,C] int64.
            problems: [N] problems, that of each completion.
        """
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [problem.answer_prefix + text for problem, text in zip(problems, texts, strict=True)]

    def finished(self, completion_ids: Tensor) -> Tensor:
        """Whether an end token or padding stands in a completion, [N] bool.

        Args:
            completion_ids: [N,C] int64.
        """
        ends = torch.tensor(self.end_token_ids, device=completion_ids.device)
        return torch.isin(completion_ids, ends).any(dim=1)

    def encode(self, problem: Problem, where: str) -> list[int]:
        """Token ids of the rendered prompt.

        Args:
            problem: what to render.
            where: the row in words, for error messages.

        Raises:
            ConfigError: where the prompt is empty, too long, or holds the mask token.
        """
        ids = self._ids(self.render(problem))
        if not ids:
            raise ConfigError(f"{where}: its prompt is empty; correct the data, or drop the row")
        if len(ids) > self.max_length:
            raise ConfigError(
                f"{where}: its prompt has {len(ids)} tokens, data.max_prompt_length is {self.max_length}; "
                "raise it, or set data.long_prompts: drop"
            )
        if self.mask_token_id is not None and self.mask_token_id in ids:
            mask = self.tokenizer.convert_ids_to_tokens(self.mask_token_id)
            raise ConfigError(
                f"{where}: its prompt holds the mask token {mask!r}, "
                "which the policy would read as a position to fill in; drop the row"
            )
        return ids

    def encode_demonstration(self, problem: Problem, length: int, where: str) -> list[int]:
        """Token ids of the problem's demonstration, which goes on from its answer prefix, padded to `length`.

        Args:
            problem: with a demonstration.
            length: of the result, tokens.
            where: the row in words, for error messages.

        Raises:
            ConfigError: where there is no demonstration, it is too long, or it repeats the answer prefix.
        """
        if problem.demonstration is None:
            raise ConfigError(
                f"{where}: it has no demonstration; choose a task that has, or unset demonstration_length"
            )
        if problem.answer_prefix and problem.demonstration.startswith(problem.answer_prefix):
            raise ConfigError(
                f"{where}: its demonstration repeats the answer prefix {problem.answer_prefix!r}, with which "
                "its prompt ends; the task must leave it out of the one or the other"
            )
        ids = self._ids(problem.demonstration)
        if len(ids) > length:
            raise ConfigError(
                f"{where}: its demonstration has {len(ids)} tokens, data.demonstration_length is {length}; "
                "raise it"
            )
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return ids + [pad] * (length - len(ids))

    def num_tokens(self, problem: Problem) -> int:
        """Length of the rendered prompt, tokens."""
        return len(self._ids(self.render(problem)))

    def _ids(self, text: str) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False)
        return found["input_ids"]  # pyright: ignore[reportReturnType]
