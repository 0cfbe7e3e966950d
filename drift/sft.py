"""Masked-diffusion fine-tuning on demonstrations: how a base policy is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drift.contract import ConfigError, MaskedBatch, PromptBatch
from drift.finite import finite_on_all_ranks
from drift.logprobs import token_logprobs
from drift.models import LoRAConfig
from drift.optimizer import OptimizerConfig, clip_gradients
from drift.policy_module import DType, PolicyModule
from drift.randomness import fold, run_seed, uniform

# Least share of masked tokens: 1/t weights would have no bound (LLaDA, arXiv 2502.09992, algorithm 2).
MIN_SHARE = 1e-3


class SFTModule(PolicyModule):
    """Fine-tunes a policy on demonstrations (LLaDA, arXiv 2502.09992, eq. 5).

    Per row t ~ U(0,1); each completion token, padding included, is masked with probability t; the loss is the
    cross entropy of the masked tokens weighted 1/t, per completion token.

    Args:
        policy: a Hugging Face folder, the bare name of a policy that comes with drift, or a hub id.
        optimizer: settings of AdamW.
        random_init: start from fresh weights, of the folder's config.json.
        dtype: dtype of the policy's parameters.
        seed: of the masks; None: that of `seed_everything`.
        lora: adapters to train in place of the weights, which stay as they are; None: train the weights.
        activation_checkpointing: compute the blocks again in backward: less memory, the same numbers, slower.
        gather_for_rollout: of a sharded policy, hold all weights on every rank for an evaluation,
            gathered once; False: gather them in every pass, block by block: less memory, slower.
    """

    command = "sft"

    def __init__(
        self,
        policy: str,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5),  # noqa: B008 - frozen
        random_init: bool = False,
        dtype: DType = "float32",
        seed: int | None = None,
        lora: LoRAConfig | None = None,
        activation_checkpointing: bool = False,
        gather_for_rollout: bool = True,
    ) -> None:
        super().__init__(
            policy, optimizer, dtype, random_init, lora, activation_checkpointing, gather_for_rollout
        )
        self.seed = run_seed(seed)
        self._batch: PromptBatch  # at hand

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """The loss of one batch of demonstrations."""
        if batch.completion_ids is None:
            raise ConfigError(
                "the batch has no demonstrations: set data.demonstration_length, and use a task whose "
                "problems have them"
            )
        self._batch = batch
        noisy, share = mask_demonstrations(batch, self.policy.mask_token_id, self.seed)
        # Passes through a sharded policy communicate: every rank makes one.
        logp = token_logprobs(self.policy, noisy, one_pass=self.device_mesh is not None).logp
        loss = -(logp / share[:, None]).sum() / logp.numel()
        self.log("loss/total", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_gradient_clipping(self, optimizer: object, *_: object, **__: object) -> None:
        """Clips by the optimizer's setting, which the trainer's would be a second place for."""
        norm = clip_gradients(self.policy.parameters(), self.optimizer_config.gradient_clip)
        if finite_on_all_ranks(norm):
            self.take_step()
            self.log("update/grad_norm", norm)
        else:
            self.skip_step("the norm of the gradient", norm, self._batch)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Steps the schedule, unless the optimizer's step was skipped."""
        if not self.skipped.in_a_row:
            scheduler.step()


def mask_demonstrations(batch: PromptBatch, mask_token_id: int, seed: int) -> tuple[MaskedBatch, Tensor]:
    """Demonstrations with a random share of their tokens masked, keyed by (seed, place in the stream).

    Args:
        batch: B prompts with completion_ids [B,C].
        mask_token_id: what a masked position holds.
        seed: of the draws.

    Returns:
        M = B noisy states, and the share t of each row, [B] float32.
    """
    completion = batch.completion_ids
    assert completion is not None
    key = fold(seed, batch.positions)
    share = (MIN_SHARE + (1 - MIN_SHARE) * uniform(fold(key, 0))).float()
    columns = torch.arange(1, completion.shape[1] + 1, device=completion.device)
    masked = uniform(fold(key[:, None], columns)) < share[:, None]
    ones = torch.ones_like(share)
    states = MaskedBatch(
        input_ids=torch.cat((batch.prompt_ids, completion.masked_fill(masked, mask_token_id)), dim=1),
        attention_mask=torch.cat((batch.prompt_mask, torch.ones_like(masked)), dim=1),
        targets=completion,
        scored=masked,
        current=masked,
        weight=ones,
        row_share=ones,
        slot=torch.zeros_like(batch.positions),
        row=torch.arange(len(completion), device=completion.device),
        advantages=ones,
        num_slots=1,
    )
    return states, share
