"""From a checkpoint to a Hugging Face folder that the original code base of the model loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from drift.checkpoints import CheckedCheckpointIO, require_checkpoint_file
from drift.contract import ConfigError
from drift.models import LoRAConfig, add_adapters, fingerprint, load_policy, merged_state_dict, resolve_folder
from drift.models.writing import ExportDType, require_export_options, require_exportable, write_folder

# Where a checkpoint keeps what an export needs beside the weights.
PROVENANCE = "export"
_POLICY = "policy."


def export(
    ckpt_path: str,
    output: str,
    policy: str | None = None,
    tokenizer: str | None = None,
    dtype: ExportDType = "source",
    max_shard_size: str = "5GB",
) -> None:
    """Writes the policy of a checkpoint as a Hugging Face folder; adapters are merged into its weights.

    Tensor names, dtypes, config keys, tokenizer and other files are those of the folder that training started
    from.

    Args:
        ckpt_path: a checkpoint, such as checkpoints/best.ckpt.
        output: the folder to write; an earlier policy there is replaced, anything else is refused.
        policy: the folder, shipped policy or hub id that training started from; None: the checkpoint knows.
        tokenizer: another folder to take the tokenizer from; None: the one of the run.
        dtype: of the weights; `source` gives each tensor the one that it had at the start.
        max_shard_size: of one safetensors file, such as 5GB or 500MB.

    Raises:
        ConfigError: where checkpoint, policy and options don't fit together, or something would be lost.
    """
    require_export_options(dtype, max_shard_size)
    require_checkpoint_file(ckpt_path)
    checkpoint = CheckedCheckpointIO(TorchCheckpointIO()).load_checkpoint(
        ckpt_path, map_location="cpu", weights_only=True
    )
    known = checkpoint.get(PROVENANCE, {})
    start = policy or known.get("policy")
    if start is None:
        raise ConfigError(
            f"policy is None: {ckpt_path!r} doesn't say which policy its training started from; give the "
            "folder that model.policy was"
        )
    source = resolve_folder(start, "policy")
    words = tokenizer or known.get("tokenizer")
    require_exportable(Path(output), source)
    write_folder(
        _weights(checkpoint, source),
        source,
        Path(output),
        tokenizer=None if words is None else resolve_folder(words, "tokenizer"),
        dtype=dtype,
        max_shard_size=max_shard_size,
        chat_template=known.get("chat_template"),
    )


def _weights(checkpoint: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """The policy's weights under the hub's names, of a checkpoint that holds them all, or adapters alone."""
    state = {
        name.removeprefix(_POLICY): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_POLICY)
    }
    adapters = checkpoint.get("adapters")
    if adapters is None:
        return state
    policy = load_policy(source, key="policy")
    if fingerprint(policy) != adapters["weights"]:
        raise ConfigError(
            f"policy is {str(source)!r}: the checkpoint's adapters were trained on other weights; give the "
            "policy that they were trained on"
        )
    add_adapters(policy, LoRAConfig(**{k: v for k, v in adapters.items() if k != "weights"}), seed=0)
    policy.load_state_dict(state, strict=False)
    return merged_state_dict(policy)
