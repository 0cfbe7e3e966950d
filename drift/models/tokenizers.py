"""Tokenizers from Hugging Face folders, and whether one is the policy's; no hub code is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from drift.contract import ConfigError
from drift.models.loading import resolve_folder

# Tokenizer classes that a vocab.json and merges.txt of the hub may name, and that are byte-level BPE with
# Qwen2's splitting and NFC. Dream's is code of its folder, which says nothing that Qwen2's doesn't.
_QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]", "<mask>")
_SUPPORTED = "a tokenizer.json, or vocab.json and merges.txt of a Qwen2 tokenizer such as Dream's"
_OTHER = "use the tokenizer that the policy was trained with"


def load_tokenizer(path: str | Path, key: str = "data.tokenizer") -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder: its tokenizer.json, or Qwen2's vocab.json and merges.txt.

    Args:
        path: what `resolve_folder` takes.
        key: the setting that the path comes from, for error messages.

    Raises:
        ConfigError: where the folder has neither, its files are damaged, or its tokenizer is code.
    """
    folder = resolve_folder(path, key)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = _converted(folder, key)
    except ConfigError:
        raise
    except Exception as error:  # the Rust tokenizer raises bare Exception on a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key} is {str(folder)!r}: its tokenizer files cannot be read: {reason}"
        ) from error
    # What is saved of it must not point to code that isn't there.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _converted(folder: Path, key: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a vocab.json and merges.txt, with the ids that tokenizer_config.json declares."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind = config.get("tokenizer_class")
    code = config.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    found = sorted(p.name for p in folder.iterdir())
    if kind not in _QWEN2_CLASSES and code is not None:
        raise ConfigError(
            f"{key} is {str(folder)!r}: its tokenizer exists only as code of that folder ({code}), which "
            f"drift never runs; set {key} to a folder with {_SUPPORTED}"
        )
    if not {"vocab.json", "merges.txt"} <= set(found):
        raise ConfigError(
            f"{key} is {str(folder)!r}: it has no tokenizer.json, only {found}; "
            f"set {key} to a folder with one: {_SUPPORTED}"
        )
    if kind not in _QWEN2_CLASSES:
        raise ConfigError(
            f"{key} is {str(folder)!r}: its tokenizer_config.json has tokenizer_class: {kind!r}, and how "
            "that one splits texts its vocab.json and merges.txt don't say; "
            f"set {key} to a folder with {_SUPPORTED}"
        )
    words, _ = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    wanted = words | _added_ids(folder, config)
    # A token that no file gives an id, or a gap between ids, moves the ids of others, and with them what the
    # policy's embeddings stand for.
    moved = sorted(wanted.items() ^ tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    if moved:
        raise ConfigError(
            f"{key} is {str(folder)!r}: the ids of {sorted({name for name, _ in moved})[:4]} cannot be kept: "
            "each special token needs an id in added_tokens_decoder of tokenizer_config.json, without gaps, "
            "above those of vocab.json"
        )
    return tokenizer


def _added_ids(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    if "added_tokens_decoder" in config:
        return {token["content"]: int(number) for number, token in config["added_tokens_decoder"].items()}
    file = folder / "added_tokens.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def require_matching_tokenizer(policy_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ConfigError where tokenizer and policy disagree on mask, padding, end or vocabulary.

    A tokenizer with fewer tokens than the policy has rows is fine: the rest are rows of padding. So is an end
    token that differs from the policy's: chat tokenizers end a turn with another one than a text.

    Args:
        policy_config: config.json of the policy.
        tokenizer: to be used with it.
    """
    tokens = {number: name for name, number in tokenizer.get_vocab().items()}
    given = f"data.tokenizer is {tokenizer.name_or_path!r}"
    for key, number in _special_ids(policy_config):
        if number not in tokens:
            raise ConfigError(
                f"{given}: it has no token for the policy's {key} {number} ({len(tokens)} tokens); {_OTHER}"
            )
    mask_id, pad_id = policy_config["mask_token_id"], policy_config["pad_token_id"]
    for key, number in _special_ids(policy_config):
        if key != "mask_token_id" and number == mask_id:
            raise ConfigError(
                f"the policy's config.json has mask_token_id and {key} both {mask_id}; they must differ"
            )
    for kind, ours, theirs in (
        ("mask", tokenizer.mask_token_id, mask_id),
        ("pad", tokenizer.pad_token_id, pad_id),
    ):
        if ours != theirs and not (kind == "mask" and ours is None):
            name = "padding" if kind == "pad" else kind
            raise ConfigError(
                f"{given}: its {name} token {getattr(tokenizer, f'{kind}_token')!r} has id {ours}, "
                f"the policy's {kind}_token_id is {theirs}; {_OTHER}"
            )
    _require_special(policy_config, tokenizer, tokens, given)
    rows = policy_config.get("embedding_size") or policy_config.get("vocab_size") or 0
    if max(tokens) >= rows:
        raise ConfigError(f"{given}: it has {max(tokens) + 1} tokens, the policy only {rows}; {_OTHER}")


def _special_ids(policy_config: dict[str, Any]) -> list[tuple[str, int]]:
    """The policy's special ids by their keys: mask, padding, and the ends of a text where it names some."""
    end = policy_config.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    found = [(key, policy_config.get(key)) for key in ("mask_token_id", "pad_token_id")]
    found += [("eos_token_id", number) for number in ends]
    for key, number in found:
        if not isinstance(number, int) or number < 0:
            raise ConfigError(f"the policy's config.json has {key}: {number!r}; it must be a token id")
    return [(key, number) for key, number in found if isinstance(number, int)]


def _require_special(
    policy_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tokens: dict[int, str], given: str
) -> None:
    """Raises ConfigError where a special id of the policy is a word, or its mask is not the tokenizer's."""
    special = set(tokenizer.added_tokens_decoder)
    for key, number in _special_ids(policy_config):
        if number not in special:
            raise ConfigError(
                f"{given}: the policy's {key} {number} is {tokens[number]!r} there, an ordinary word; "
                f"{_OTHER}"
            )
    mask_id = policy_config["mask_token_id"]
    known = {name: number for number, name in tokens.items() if name in _MASK_NAMES}
    if known and tokens[mask_id] not in known:
        raise ConfigError(
            f"{given}: the policy's mask_token_id {mask_id} is {tokens[mask_id]!r} there, and its mask token "
            f"is {' or '.join(f'{name} ({number})' for name, number in known.items())}; {_OTHER}"
        )
