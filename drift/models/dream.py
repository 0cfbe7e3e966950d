"""Dream (Ye et al., arXiv 2508.15487): bidirectional Qwen2 blocks; raw logits at i - 1 predict token i."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from drift.contract import ConfigError
from drift.models.base import DiffusionLM
from drift.models.head import VocabHead
from drift.models.inspection import require_sizes, require_values
from drift.models.layers import Block, KeyValueCache, RMSNorm, default_positions, gated, rotate


class DreamConfig(PreTrainedConfig):
    """Settings of a Dream checkpoint, under the hub's keys; keys not listed here are kept as they came.

    The defaults are those of Dream-v0-Instruct-7B.
    """

    model_type = "Dream"

    hidden_size: int = 3584
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    num_hidden_layers: int = 28
    intermediate_size: int = 18944
    vocab_size: int = 152064
    max_position_embeddings: int = 131072
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    tie_word_embeddings: bool = False
    mask_token_id: int | None = 151666
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def __post_init__(self, **kwargs: Any) -> None:
        # Set afterwards, and under transformers' name: its setter of the hub's one warns.
        scaling = kwargs.pop("rope_scaling", None) or kwargs.pop("rope_parameters", None)
        super().__post_init__(**kwargs)
        self.rope_parameters = scaling

    def require_supported(self) -> None:
        """Raises ConfigError where the checkpoint needs something that this class does not compute."""
        sizes = (
            "hidden_size",
            "num_attention_heads",
            "num_hidden_layers",
            "intermediate_size",
            "vocab_size",
            "num_kv_heads",
        )
        require_sizes(self, sizes)
        require_values(
            self,
            "Dream",
            {
                "hidden_act": ("silu",),
                "attention_dropout": (0.0,),
                "use_sliding_window": (False,),
            },
        )
        if self.rope_parameters is not None:
            raise ConfigError(
                f"config.json has rope_scaling: {self.rope_parameters!r}; supported for Dream: [None]"
            )
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json has hidden_size: {self.hidden_size}, num_attention_heads: "
                f"{self.num_attention_heads}, num_key_value_heads: {self.num_key_value_heads}; hidden_size "
                "must be a multiple of num_attention_heads, and these of num_key_value_heads"
            )

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads


class DreamAttention(nn.Module):
    """What grouped attention has weights for, biases on queries, keys and values; the names are the hub's."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.head_width = config.hidden_size // config.num_attention_heads
        kv_width = self.head_width * config.num_kv_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; see `Block.project`."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, table), rotate(key, table), value


class DreamMLP(nn.Module):
    """Gated feed-forward layer; the attribute names are the hub's."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer adds to the residual stream, [B,l,D]."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class DreamBlock(Block):
    """One transformer block; the attribute names are those of the hub's tensors."""

    def __init__(self, config: DreamConfig, layer: int) -> None:
        super().__init__(layer)
        self.self_attn = DreamAttention(config)
        self.mlp = DreamMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def project(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; see `Block.project`."""
        return self.self_attn(self.input_layernorm(x), table)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after attention and feed-forward layer; see `Block.finish`."""
        x = x + self.self_attn.o_proj(mixed)
        return x + self.mlp(self.post_attention_layernorm(x))


class Dream(DiffusionLM):
    """The Dream policy; loads and saves the hub's folders (Qwen2's tensor names)."""

    config_class = DreamConfig
    config: DreamConfig
    hub_architectures = ("DreamModel",)
    _no_split_modules = ["DreamBlock"]  # noqa: RUF012 - transformers reads it from the class
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DreamConfig) -> None:
        config.require_supported()
        super().__init__(config)
        parts = {
            # As in the original, the embedding of padding is never trained.
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id),
            "layers": nn.ModuleList(DreamBlock(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        }
        self.model = nn.ModuleDict(parts)
        self.lm_head = VocabHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def head(self) -> VocabHead:
        """The output head: logits = head(hidden)."""
        return self.lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return cast(nn.ModuleList, self.model["layers"])

    @property
    def init_std(self) -> float:
        """Standard deviation of freshly initialised weights."""
        return self.config.initializer_range

    @property
    def illegal_token_ids(self) -> list[int]:
        """The mask token, and the rows above it, which fill the head up and stand for no token."""
        return list(range(self.mask_token_id, self.config.vocab_size))

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model["embed_tokens"]

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the token embedding."""
        self.model["embed_tokens"] = value

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B,l,D] or [n,D], aligned; see `DiffusionLM.forward`."""
        if position_ids is None:
            position_ids = default_positions(input_ids, attention_mask)
        # Asked before the blocks are run: they open the cache.
        kept = None if cache is None else cache.state_to_keep
        before = None if cache is None else cache.state
        if wanted is None:
            raw = self.model["norm"](self.run_blocks(input_ids, attention_mask, position_ids, cache))
            found, states = shifted(raw, position_ids, before), raw if kept is None else raw[:, kept]
        else:
            row, position = wanted
            # What `shifted` does: the state before predicts a token, but for the first one.
            place = torch.where(position_ids[wanted] == 0, position, position - 1)
            asked = (row, place.clamp(min=0))
            if kept is not None:
                rows = torch.arange(len(input_ids), device=row.device)
                asked = (torch.cat((row, rows)), torch.cat((asked[1], torch.full_like(rows, kept))))
            raw = self.model["norm"](self.run_blocks(input_ids, attention_mask, position_ids, cache, asked))
            found, states = raw[: len(row)], raw[len(row) :]
            if before is not None:
                found = torch.where((place < 0)[:, None], before[row], found)
        if cache is not None and kept is not None:
            # A copy: a view would keep all states alive.
            cache.state = states.clone()
        return found


def shifted(raw: Tensor, position_ids: Tensor, before: Tensor | None) -> Tensor:
    """Hidden states moved by one, so that position i holds what predicts the token at i.

    Shifting comes before anything is cut off: cut first, and the first token of a completion would be scored
    with its own row instead of the prompt's last one.

    Args:
        raw: [B,l,D] hidden states as the body gives them.
        position_ids: [B,l] int64; a first token (position 0) has no predecessor and keeps its own state.
        before: [B,D] state of the position before the fed ones; None: they begin the sequence.
    """
    previous = torch.cat((raw[:, :1] if before is None else before[:, None], raw[:, :-1]), dim=1)
    return torch.where((position_ids == 0)[..., None], raw, previous)
