"""Shows what the policy is asked: the first prompt exactly as it is tokenised."""

from __future__ import annotations

import sys
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from drift.contract import ConfigError

_SPLITS = {"fit": "training", "validate": "validation"}


class PromptCallback(Callback):
    """Prints the first prompt before weights are loaded, and writes it whole to TensorBoard as `prompt`.

    The text is that of the prompt's token ids: chat template, system prompt, answer prefix and all special
    tokens.

    Args:
        max_characters: longest text on the screen, characters; the middle of a longer one is left out there.
            0: nothing is printed.

    Raises:
        ConfigError: where `max_characters` is negative.
    """

    def __init__(self, max_characters: int = 1200) -> None:
        if max_characters < 0:
            raise ConfigError(
                f"prompt.max_characters is {max_characters}: set it to 0, which prints nothing, or more"
            )
        self.max_characters = max_characters

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shows the prompt, on the first rank."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or data is None or not data.examples:
            return
        split = _SPLITS.get(stage, "test")
        ids = data.template.encode(data.examples[0], f"the first {split} prompt")
        text = data.tokenizer.decode(ids, skip_special_tokens=False)
        if self.max_characters:
            chat = data.template.chat
            title = f"first {split} prompt, {len(ids)} tokens, {chat.whose if chat else 'bare text'}"
            sys.stdout.write(f"--- {title} ---\n{_cut(text, self.max_characters).rstrip()}\n---\n")
            sys.stdout.flush()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("prompt", _markdown(text, len(ids)), 0)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    head, tail = text[: longest - longest // 2], text[len(text) - longest // 2 :]
    return f"{head}\n[... {len(text) - longest} characters ...]\n{tail}"


def _markdown(text: str, num_tokens: int) -> str:
    # Indented, a text is code to Markdown whatever it holds: fences of three backticks are common in prompts.
    body = "\n".join(f"    {line}" for line in text.split("\n"))
    return f"{num_tokens} tokens\n\n{body}"
