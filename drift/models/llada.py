"""LLaDA (Nie et al., arXiv 2502.09992): llama blocks without a causal mask; logits at i predict token i."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from drift.contract import ConfigError
from drift.models.base import DiffusionLM
from drift.models.head import VocabHead
from drift.models.inspection import require_sizes, require_values
from drift.models.layers import Block, KeyValueCache, RMSNorm, default_positions, gated, rotate


class LLaDAConfig(PreTrainedConfig):
    """Settings of a LLaDA checkpoint, under the hub's keys; keys not listed here are kept as they came."""

    model_type = "llada"
    attribute_map = {  # noqa: RUF012 - transformers reads it from the class
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = 12288
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    init_std: float = 0.02
    include_bias: bool = False
    include_qkv_bias: bool | None = False
    weight_tying: bool = False
    block_type: str = "llama"
    activation_type: str = "silu"
    layer_norm_type: str = "rms"
    mask_token_id: int | None = 126336
    pad_token_id: int | None = 126081
    eos_token_id: int | list[int] | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        # The hub's key wins over transformers' own default: one switch, not two that may disagree.
        kwargs.pop("tie_word_embeddings", None)
        super().__post_init__(tie_word_embeddings=self.weight_tying, **kwargs)

    def require_supported(self) -> None:
        """Raises ConfigError where the checkpoint needs something that this class does not compute."""
        require_sizes(self, ("d_model", "n_heads", "n_layers", "vocab_size", "num_kv_heads"))
        require_values(
            self,
            "LLaDA",
            {
                "block_type": ("llama",),
                "activation_type": ("silu",),
                "layer_norm_type": ("rms",),
                "include_bias": (False,),
                "alibi": (False,),
                "rope": (True,),
                "attention_layer_norm": (False,),
                "input_emb_norm": (False,),
                "scale_logits": (False,),
                "attention_dropout": (0.0,),
                "embedding_dropout": (0.0,),
                "residual_dropout": (0.0,),
            },
        )
        if self.d_model % self.n_heads or self.n_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json has d_model: {self.d_model}, n_heads: {self.n_heads}, "
                f"n_kv_heads: {self.n_kv_heads}; "
                "d_model must be a multiple of n_heads, and n_heads of n_kv_heads"
            )

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_heads or self.n_heads


class LLaDABlock(Block):
    """One transformer block; the attribute names are those of the hub's tensors."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__(layer)
        self.head_width = config.d_model // config.n_heads
        mlp_width = config.mlp_hidden_size or 4 * config.d_model
        kv_width = self.head_width * config.num_kv_heads
        bias = bool(config.include_qkv_bias)
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=bias)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, mlp_width, bias=False)
        self.up_proj = nn.Linear(config.d_model, mlp_width, bias=False)
        self.ff_out = nn.Linear(mlp_width, config.d_model, bias=False)

    def project(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; see `Block.project`."""
        h = self.attn_norm(x)
        query, key, value = (
            projection(h).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, table), rotate(key, table), value

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after attention and feed-forward layer; see `Block.finish`."""
        x = x + self.attn_out(mixed)
        h = self.ff_norm(x)
        return x + self.ff_out(gated(self.ff_proj(h), self.up_proj(h)))


class LLaDA(DiffusionLM):
    """The LLaDA policy; loads and saves the hub's folders (`model.transformer.*` tensors)."""

    config_class = LLaDAConfig
    config: LLaDAConfig
    hub_architectures = ("LLaDAModelLM",)
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - transformers reads it from the class
    _tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDAConfig) -> None:
        config.require_supported()
        super().__init__(config)
        rows = config.embedding_size or config.vocab_size
        parts = {
            "wte": nn.Embedding(rows, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, i) for i in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "ff_out": VocabHead(config.d_model, rows, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.post_init()

    @property
    def _transformer(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.model["transformer"])

    @property
    def head(self) -> VocabHead:
        """The output head: logits = head(hidden)."""
        return cast(VocabHead, self._transformer["ff_out"])

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return cast(nn.ModuleList, self._transformer["blocks"])

    @property
    def init_std(self) -> float:
        """Standard deviation of freshly initialised weights."""
        return self.config.init_std

    @property
    def illegal_token_ids(self) -> list[int]:
        """The mask token, and rows beyond the vocabulary, which stand for no token."""
        return [self.mask_token_id, *range(self.config.vocab_size, self.head.out_features)]

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self._transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B,l,D] or [n,D]; see `DiffusionLM.forward`."""
        if position_ids is None:
            position_ids = default_positions(input_ids, attention_mask)
        x = self.run_blocks(input_ids, attention_mask, position_ids, cache, wanted)
        return self._transformer["ln_f"](x)
