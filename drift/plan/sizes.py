"""What there is to count in a policy: its parameters, from its class built without memory, and its widths."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from drift.models import DiffusionLM
from drift.models.known import find_config
from drift.optimizer import OptimizerConfig, build_optimizer

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PolicySizes:
    """Parameters and widths of a policy."""

    source: str  # where they come from, in words
    shapes: tuple[tuple[Shape, ...], ...]  # of every parameter, by the optimizer's parameter groups
    linears: tuple[tuple[str, int, int], ...]  # linear layers of all blocks: name, inputs, outputs
    num_block_parameters: int  # of the largest block
    num_blocks: int
    width: int  # of the residual stream
    kv_width: int  # of all key heads together, and of all value heads
    num_heads: int
    head_width: int  # of one attention head
    mlp_width: int
    vocab_rows: int  # rows of the output head
    max_length: int  # positions of a sequence

    @property
    def num_parameters(self) -> int:
        """All parameters; tied ones count once."""
        return sum(prod(shape) for group in self.shapes for shape in group)

    @property
    def num_linear(self) -> int:
        """Weights of the linear layers of all blocks."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    @property
    def num_head(self) -> int:
        """Weights of the output head."""
        return self.vocab_rows * self.width

    def adapters(self, rank: int, targets: tuple[str, ...] | None) -> tuple[Shape, ...]:
        """Shapes of the low-rank adapters.

        Args:
            rank: rows of A and columns of B.
            targets: names of the linear layers that have one; None: all of the blocks.
        """
        return tuple(
            shape
            for name, inputs, outputs in self.linears
            if targets is None or name in targets
            for shape in ((rank, inputs), (outputs, rank))
        )


def policy_sizes(path: str | Path, key: str = "model.policy") -> PolicySizes:
    """The sizes of a policy, without its weights and without the network.

    Args:
        path: a Hugging Face folder, a policy that comes with drift, or a hub id in the hub's cache, or known.
        key: the setting that the path comes from, for error messages.

    Raises:
        ConfigError: where there is no such policy.
    """
    family, config, source = find_config(path, key)
    with torch.device("meta"):
        policy = family(config)
    return sizes_of(policy, source)


def sizes_of(policy: DiffusionLM, source: str) -> PolicySizes:
    """The sizes of a policy that is there, on whatever device.

    Args:
        policy: the policy, without adapters.
        source: where it comes from, in words.
    """
    groups = build_optimizer(policy, OptimizerConfig()).param_groups
    linears = [
        (name.rpartition(".")[2], layer.in_features, layer.out_features)
        for name, layer in policy.blocks.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    config = policy.config
    head_width = config.hidden_size // config.num_attention_heads
    return PolicySizes(
        source=source,
        shapes=tuple(tuple(tuple(p.shape) for p in group["params"]) for group in groups),
        linears=tuple(linears),
        num_block_parameters=max(sum(p.numel() for p in block.parameters()) for block in policy.blocks),
        num_blocks=len(policy.blocks),
        width=config.hidden_size,
        kv_width=config.num_kv_heads * head_width,
        num_heads=config.num_attention_heads,
        head_width=head_width,
        mlp_width=config.intermediate_size or 4 * config.hidden_size,
        vocab_rows=policy.head.weight.shape[0],
        max_length=config.max_position_embeddings,
    )
