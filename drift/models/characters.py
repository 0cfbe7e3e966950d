"""A tokenizer with one token per character: for small policies, puzzles and tests."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError

PAD, MASK = "<|endoftext|>", "<|mask|>"


def character_tokenizer(
    size: int | None = None, pad_token_id: int = 0, mask_token_id: int = 1
) -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII characters, whose ids are filled from 0 around the special ones.

    Args:
        size: number of tokens; what is left over is unused. None: as few as it takes.
        pad_token_id: id of the token that pads and ends a text.
        mask_token_id: id of the mask token.

    Raises:
        ConfigError: where the size doesn't hold all characters and both special ids.
    """
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    special = {pad_token_id: PAD, mask_token_id: MASK}
    size = size or max(len(characters) + 2, pad_token_id + 1, mask_token_id + 1)
    free = [i for i in range(size) if i not in special]
    if len(special) < 2 or max(special) >= size or len(free) < len(characters):
        raise ConfigError(
            f"size is {size}, pad_token_id {pad_token_id}, mask_token_id {mask_token_id}: a character "
            f"tokenizer needs {len(characters)} ids besides two different special ones below its size"
        )
    tokens = dict(zip(free, characters, strict=False)) | special
    vocabulary = {tokens.get(i, f"<|unused_{i}|>"): i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=PAD,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
