"""The checks of a folder: what its files say, and then what its policy does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from drift.contract import ConfigError
from drift.doctor.checks import Check
from drift.doctor.examination import examine
from drift.models import (
    load_policy,
    load_tokenizer,
    read_config,
    require_matching_tokenizer,
    resolve_folder,
)


def examine_folder(
    path: str | Path, tokenizer: str | None = None, dtype: torch.dtype = torch.float32
) -> list[Check]:
    """All checks on a folder, as far as they can be made.

    Args:
        path: what `drift.models.resolve_folder` takes.
        tokenizer: another folder to take the tokenizer from; None: the policy's own.
        dtype: to load the weights in.
    """
    checks: list[Check] = []
    try:
        folder = resolve_folder(path, "path")
        config = read_config(folder, "path")
    except ConfigError as error:
        return [Check(name="folder", status="failed", found="it cannot be used", fix=str(error))]
    checks.append(Check(name="folder", status="ok", found=f"{folder}, model_type {config['model_type']}"))
    words = None
    try:
        words = load_tokenizer(tokenizer or folder, "tokenizer")
        checks.append(_tokenizer(config, words))
        # What another tokenizer makes of a text would say nothing of this policy.
        words = words if checks[-1].status == "ok" else None
    except ConfigError as error:
        checks.append(Check(name="tokenizer", status="failed", found="it cannot be used", fix=str(error)))
    try:
        policy = load_policy(folder, dtype, key="path").eval()
    except ConfigError as error:
        failed = Check(name="weights", status="failed", found="they cannot be used", fix=str(error))
        return [*checks, failed]
    return checks + examine(policy, words, [])


def _tokenizer(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Check:
    try:
        require_matching_tokenizer(config, tokenizer)
    except ConfigError as error:
        return Check(name="tokenizer", status="failed", found="it is not the policy's", fix=str(error))
    ids = {name: config[name] for name in ("mask_token_id", "pad_token_id")}
    named = ", ".join(f"{k} {v} {tokenizer.convert_ids_to_tokens(v)!r}" for k, v in ids.items())
    return Check(name="tokenizer", status="ok", found=f"{len(tokenizer)} tokens, {named}")
