"""From a problem to the token ids that the policy is prompted with."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError, Problem


class PromptTemplate:
    """Renders and tokenises prompts: a user turn where the tokenizer has a chat template, else the bare text.

    Args:
        tokenizer: of the policy.
        system_prompt: put before every prompt, as a system turn where there is a chat template.
        max_length: longest prompt in tokens.
        mask_token_id: of the policy: not every tokenizer says which of its tokens is the mask. None: it does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        system_prompt: str | None,
        max_length: int,
        mask_token_id: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.mask_token_id = tokenizer.mask_token_id if mask_token_id is None else mask_token_id

    def render(self, problem: Problem) -> str:
        """The text that the policy is prompted with."""
        if not self.tokenizer.chat_template:
            return "\n".join(part for part in (self.system_prompt, problem.prompt) if part)
        turns = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        turns.append({"role": "user", "content": problem.prompt})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

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
        """Token ids of the problem's demonstration, padded to `length`.

        Args:
            problem: with a demonstration.
            length: of the result, tokens.
            where: the row in words, for error messages.

        Raises:
            ConfigError: where there is no demonstration, or it is too long.
        """
        if problem.demonstration is None:
            raise ConfigError(
                f"{where}: it has no demonstration; choose a task that has, or unset demonstration_length"
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
