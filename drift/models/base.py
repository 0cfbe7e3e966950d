"""What the rest of drift knows of a policy: the `DiffusionLM` interface and the parts its families share."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from drift.models.adapters import merged_state_dict
from drift.models.head import VocabHead
from drift.models.layers import KeyValueCache, RMSNorm, rotary_table
from drift.models.writing import restore_texts

# Finite, so that 0 * it is 0 in an entropy, and far enough down that its softmax is exactly 0.
ILLEGAL_LOGIT = -1e30


class DiffusionLM(PreTrainedModel):
    """A masked diffusion language model: a bidirectional body and a head that scores masked positions.

    `forward` is the body. Families align its output, so that everywhere in drift the head applied to
    `hidden[:, i]` scores the token at position i. Body and head are separate because the head is needed
    at few positions only.
    """

    base_model_prefix = "model"
    hub_architectures: ClassVar[tuple[str, ...]] = ()
    _supports_sdpa = True
    # The folder's configurations as they came: transformers renames and drops some of their keys.
    texts: Mapping[str, str] = MappingProxyType({})
    # In training, keep a block's input alone and compute the block again in backward.
    activation_checkpointing: bool = False

    @property
    def head(self) -> VocabHead:
        """The output head: logits = head(hidden)."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        raise NotImplementedError

    @property
    def units(self) -> list[list[nn.Module]]:
        """The modules that are gathered together where the policy is sharded: all but the last norm.

        Embedding and head are units of their own, or one where they share their weights.
        """
        ends: list[nn.Module] = [self.get_input_embeddings(), self.head]
        tied = self.head.weight is self.get_input_embeddings().weight
        return [*([ends] if tied else [[end] for end in ends]), *([block] for block in self.blocks)]

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.config.hidden_size // self.config.num_attention_heads

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token: the one that the policy fills in and never emits."""
        return self.config.mask_token_id

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token, which also ends an answer."""
        return self.config.pad_token_id

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states, aligned: the head applied to position i scores the token at i.

        Args:
            input_ids: [B,l] int64.
            attention_mask: [B,L] bool, False at padding; L counts cached positions too. None: no padding.
            position_ids: [B,l] int64; None: counted from the attention mask, padding left out.
            cache: keys and values of positions that are not fed, or a store for those that are.
            wanted: rows and fed positions, [n] int64 each, whose hidden states are needed: the last block
                computes little else. None: all.

        Returns:
            [B,l,D], or [n,D] of those that are wanted.
        """
        raise NotImplementedError

    def run_blocks(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: KeyValueCache | None,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The residual stream [B,l,D] or [n,D] after all blocks; arguments as for `forward`."""
        table = rotary_table(position_ids, self.head_width, self.config.rope_theta)
        key_mask = None if attention_mask is None else attention_mask[:, None, None, :]
        x = self.get_input_embeddings()(input_ids)
        # A cache would be extended a second time in backward.
        recompute = (
            self.activation_checkpointing and self.training and cache is None and torch.is_grad_enabled()
        )
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            flat = None if wanted is None or number < last else wanted[0] * input_ids.shape[1] + wanted[1]
            if recompute:
                # Nothing in a block is random.
                x = cast(
                    Tensor,
                    checkpoint(
                        block, x, table, key_mask, None, flat, use_reentrant=False, preserve_rng_state=False
                    ),
                )
            else:
                x = block(x, table, key_mask, cache, flat)
        return x

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits at every position, aligned: `logits[:, i]` scores the token at i.

        Args:
            input_ids: [B,L] int64.
            attention_mask: [B,L] bool, False at padding; None: no padding.

        Returns:
            [B,L,V], raw: illegal tokens are not masked out.
        """
        return self.head(self(input_ids, attention_mask))

    def forbid_illegal(self, logits: Tensor, *, in_place: bool = False) -> Tensor:
        """The logits over legal tokens: those that may never be emitted get no probability.

        Args:
            logits: [..., V] float.
            in_place: overwrite them.
        """
        illegal = torch.tensor(self.illegal_token_ids, dtype=torch.int64, device=logits.device)
        fill = logits.index_fill_ if in_place else logits.index_fill
        return fill(-1, illegal, ILLEGAL_LOGIT)

    @property
    def illegal_token_ids(self) -> list[int]:
        """Ids that the policy must never emit."""
        return [self.mask_token_id]

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes a Hugging Face folder: safetensors and config.json, with the hub's tensor and class names.

        Adapters are merged into the weights that are written.
        """
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = merged_state_dict(self)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            # transformers writes the name of this class, which the original code base doesn't have.
            self.config.architectures = list(self.hub_architectures)
            self.config.save_pretrained(save_directory)
            restore_texts(Path(save_directory), self.texts, str(self.dtype).removeprefix("torch."))

    def _init_weights(self, module: nn.Module) -> None:
        std = self.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    @property
    def init_std(self) -> float:
        """Standard deviation of freshly initialised weights."""
        return 0.02
