"""RLDF, Reinforcement Learning from Denoising Feedback (arXiv 2605.25638): `training_step` is the method."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from drift.advantages import AdvantageConfig, group_advantages
from drift.contract import ConfigError, LossOutput, MaskedBatch, PromptBatch, Rollout, TokenLogProbs
from drift.distributed import (
    gather_over_ranks,
    max_over_ranks,
    rank,
    require_agreement,
    sum_over_ranks,
    whole,
    world_size,
)
from drift.figures import update_figures
from drift.finite import finite_on_all_ranks
from drift.logprobs import token_logprobs
from drift.losses import LossConfig, kept_per_slot, kept_tokens, learns_commits, moving_rows, rldf_loss
from drift.masking import masked_batch
from drift.measured_module import placed_rollout, require_rollout
from drift.micro_batches import micro_batches
from drift.models import (
    DiffusionLM,
    LoRAConfig,
    reference_of,
    require_reference,
    resolve_folder,
    trainable_weights,
    weights_of,
)
from drift.optimizer import OptimizerConfig, clip_gradients
from drift.policy_module import DType, PolicyModule
from drift.randomness import fold
from drift.samplers import TimestepSampler, WeightedSampler
from drift.selection import best_groups
from drift.sequence_loss import SequenceOutput, sequence_coefficients

# Sets the draws of plans apart from those of the rollout, which are keyed by the same seeds.
_PLAN = -1
_ROLLOUT = "rollout_at_hand"


class RLDFModule(PolicyModule):
    """Owns the policy and the frozen reference, and takes one optimizer step from each batch of rollouts.

    Args:
        policy: a Hugging Face folder, the bare name of a policy that comes with drift, or a hub id.
        reference: the same for the frozen reference of the KL; None: the policy as it was at the start. It is
            loaded only where loss.beta > 0 and it is not the policy without the adapters of `lora`.
        sampler: denoising timesteps that the gradient is estimated from; None: `WeightedSampler`.
        loss: settings of the policy loss.
        optimizer: settings of AdamW.
        advantages: what rewards are compared with.
        num_updates: optimizer steps from each rollout: 1 is REINFORCE, more are PPO with clipped ratios.
        train_groups: groups of completions to train on, of all rolled out, over all ranks; None: all.
        micro_batch_size: noisy states of a micro-batch, at most; the result does not depend on it.
        micro_batch_tokens: positions of a micro-batch, prompt and completion, at most (a single noisy state
            may have more): it bounds the memory, whatever the prompts; None: any number.
        dtype: dtype of the policy's weights; with bfloat16 an update below 1/256 of a weight is lost, so keep
            float32 (with trainer.precision bf16-mixed), or set optimizer.master_weights, or lora.
        lora: adapters to train in place of the weights, which stay as they are; None: train the weights.
        activation_checkpointing: compute the blocks again in backward: less memory, the same numbers, slower.
        gather_for_rollout: of a sharded policy, hold all weights on every rank for a rollout or evaluation,
            gathered once; False: gather them in every pass, block by block: less memory, slower.

    Raises:
        ConfigError: where a value is outside its range or there is no such policy.
    """

    command = "fit"

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        sampler: TimestepSampler | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        advantages: AdvantageConfig = AdvantageConfig(),  # noqa: B008 - frozen
        num_updates: int = 1,
        train_groups: int | None = None,
        micro_batch_size: int = 64,
        micro_batch_tokens: int | None = None,
        dtype: DType = "float32",
        lora: LoRAConfig | None = None,
        activation_checkpointing: bool = False,
        gather_for_rollout: bool = True,
    ) -> None:
        super().__init__(policy, optimizer, dtype, False, lora, activation_checkpointing, gather_for_rollout)
        for key, value in (
            ("num_updates", num_updates),
            ("train_groups", 1 if train_groups is None else train_groups),
            ("micro_batch_size", micro_batch_size),
            ("micro_batch_tokens", 1 if micro_batch_tokens is None else micro_batch_tokens),
        ):
            if value < 1:
                raise ConfigError(f"model.{key} is {value}: set it to 1 or more")
        if reference is not None and loss.beta > 0:
            require_reference(reference, self.policy_config)
        self.reference_path = reference
        self.sampler = sampler or WeightedSampler()
        self.sampler.require_fits(loss)
        self.loss = loss
        self.advantages = advantages
        self.num_updates = num_updates
        self.train_groups = train_groups
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.automatic_optimization = False
        self.learned: Rollout | None = None  # the rollout at hand
        # [N,C] what the last update gave to the tokens it scored; 0 elsewhere.
        self.trained_probs: Tensor | None = None
        self._old_weights: list[Tensor] = []
        # Not a submodule: no checkpoint keys, no optimizer state, never in train mode.
        object.__setattr__(self, "reference", None)
        self.reference: DiffusionLM | None

    def configure_model(self) -> None:
        """Loads the policy, and the reference where the loss has a KL, once."""
        super().configure_model()
        folder = resolve_folder(self.reference_path or self.policy_folder, "model.reference")
        without_adapters = self.lora is not None and folder == self.policy_folder
        if self.loss.beta > 0 and self.reference is None and not without_adapters:
            reference = self._loaded(folder, "model.reference").requires_grad_(False).eval()
            object.__setattr__(self, "reference", self._sharded(reference))

    def on_fit_start(self) -> None:
        """Moves what Lightning doesn't know to the policy's device; sharded, checkpoints are read later."""
        if self.reference is not None:
            nn.Module.to(self.reference, self.device)
        self.learned = move_data_to_device(self.learned, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the rollout at hand, and the weights that made it, where further updates of it are to come."""
        super().on_save_checkpoint(checkpoint)
        if self.learned is None or self.global_step % self.num_updates == 0:
            return
        learned = move_data_to_device(self.learned, torch.device("cpu"))  # else ranks use each other's device
        rollout = {f.name: getattr(learned, f.name) for f in fields(learned)}
        old = [whole(weights).cpu() for weights in self._old_weights]
        checkpoint[_ROLLOUT] = {"ranks": gather_over_ranks(rollout), "old": old}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the rollout at hand; on another number of ranks the next update makes a new one."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_ROLLOUT, {"ranks": []})
        if len(state["ranks"]) == world_size():
            self.learned = move_data_to_device(Rollout(**state["ranks"][rank()]), self.device)
            self._old_weights = state["old"]

    def needs_rollout(self, batch: PromptBatch) -> bool:
        """Whether the batch is to be rolled out: not again for the further updates of the rollout at hand."""
        return super().needs_rollout(batch) or batch.update == 0 or self.learned is None

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One update: advantages, plan, noisy states, log-probabilities, loss, backward, step."""
        start = time.perf_counter()
        rollout = self._with_advantages(batch)
        plan = self.sampler.plan(self._keyed(rollout, batch.update))
        current, moving = self.loss.tau is None, moving_rows(rollout, self.loss)
        noisy = masked_batch(rollout, plan, self.policy.mask_token_id, moving, current_only=current)
        noisy.num_slots = max_over_ranks(noisy.num_slots, self.device)
        parts = micro_batches(noisy, self.micro_batch_size, self.micro_batch_tokens)
        # Passes communicate: ranks that disagree would wait for each other for ever, or add up what differs.
        shape = {"step": self.global_step, "update": batch.update, "rollout": rollout.step_map.shape}
        plan_shape = {"timesteps of the plan": noisy.num_slots, "micro-batches": len(parts)}
        require_agreement("the shape of an update", shape | plan_shape)
        old = self._old_logprobs(noisy, batch.update, parts)
        totals = self._totals(noisy, old, parts)
        whole = self._sequence_level(noisy, old, parts, totals)
        outputs = [] if whole is None else [whole.output()]
        self.trained_probs = torch.zeros_like(rollout.completion_ids, dtype=torch.float32)
        for number, part in enumerate(parts, start=1):
            states = noisy.select(part)
            policy = self._score(self.policy, states)
            reference = self._reference_logprobs(states)
            before = None if old is None else old.select(part)
            totals["coefficients"] = None if whole is None else whole.coefficients[part]
            output = rldf_loss(policy, states, self.loss, old=before, reference=reference, **totals)
            if not finite_on_all_ranks(output.loss):
                return self._skip("the loss", output.loss, batch)
            # Distributed strategies average gradients; the loss is already the sum over the whole batch.
            self.manual_backward(output.loss * world_size())
            self._keep_feedback(states, policy)
            self.report("update", number, len(parts))
            outputs.append(output)
        grad_norm = clip_gradients(self.policy.parameters(), self.optimizer_config.gradient_clip)
        if not finite_on_all_ranks(grad_norm):
            return self._skip("the norm of the gradient", grad_norm, batch)
        self.step_and_schedule()
        return self._log_update(outputs, noisy, grad_norm, start)

    def _with_advantages(self, batch: PromptBatch) -> Rollout:
        """What to learn from, with advantages: the rollout, or the best groups of all rounds and ranks."""
        if batch.update > 0 and self.learned is not None:
            return self.learned
        rollout = require_rollout(batch)
        group_size = len(rollout.completion_ids) // len(batch.problems)
        if self.train_groups is not None:
            rounds = [placed_rollout(one) for one in (batch, *batch.refills)]
            rollout = best_groups(rounds, group_size, self.train_groups)
        assert rollout.rewards is not None
        rollout.advantages = group_advantages(rollout.rewards.sum(dim=1), group_size, self.advantages)
        self.learned = rollout
        return rollout

    def _keyed(self, rollout: Rollout, update: int) -> Rollout:
        """The rollout under seeds of this update, so that each update draws a plan of its own."""
        return replace(rollout, seeds=None if rollout.seeds is None else fold(rollout.seeds, _PLAN, update))

    def _score(self, model: DiffusionLM, states: MaskedBatch) -> TokenLogProbs:
        with self.trainer.precision_plugin.forward_context():
            # Passes through a sharded policy communicate: every rank makes one.
            together, entropy = self.device_mesh is not None, self.loss.entropy_coeff != 0
            commits = self.loss.commit_weight > 0
            return token_logprobs(model, states, entropy=entropy, top=commits, one_pass=together)

    @torch.no_grad()
    def _reference_logprobs(self, states: MaskedBatch) -> TokenLogProbs | None:
        if self.loss.beta == 0:
            return None
        with reference_of(self.policy, self.reference) as reference:
            return self._score(reference, states)

    def _score_all(self, noisy: MaskedBatch, parts: list[Tensor]) -> TokenLogProbs:
        blank = torch.zeros(noisy.targets.shape, dtype=torch.float32, device=self.device)
        found = TokenLogProbs(logp=blank, top=None if noisy.decision is None else blank.clone())
        for part in parts:
            scores = self._score(self.policy, noisy.select(part))
            found.logp[part] = scores.logp
            if found.top is not None and scores.top is not None:
                found.top[part] = scores.top
        return found

    @torch.no_grad()
    def _old_logprobs(self, noisy: MaskedBatch, update: int, parts: list[Tensor]) -> TokenLogProbs | None:
        """Log-probabilities of the weights that made the rollout; None with one update per rollout."""
        if self.num_updates == 1:
            return None
        if update == 0 or not self._old_weights:
            self._old_weights = trainable_weights(self.policy)
        with weights_of(self.policy, self._old_weights):
            return self._score_all(noisy, parts)

    @torch.no_grad()
    def _totals(self, noisy: MaskedBatch, old: TokenLogProbs | None, parts: list[Tensor]) -> dict[str, Any]:
        """Kept tokens per slot and rows with noisy states, over all micro-batches and ranks."""
        num_rows = sum_over_ranks(torch.tensor(noisy.row.unique().numel(), device=self.device))
        if not self.loss.tau or self.loss.normalisation != "token":
            return {"num_kept": sum_over_ranks(kept_per_slot(noisy.scored, noisy)), "num_rows": num_rows}
        if old is None and len(parts) <= 1 and world_size() == 1:
            return {"num_rows": num_rows}  # the one micro-batch is the whole batch: the loss counts itself
        # Which tokens are kept only probabilities tell, and how many must be known before any backward pass.
        kept = kept_tokens(old or self._score_all(noisy, parts), noisy, self.loss.tau)
        return {"num_kept": sum_over_ranks(kept_per_slot(kept, noisy)), "num_rows": num_rows}

    def _sequence_level(
        self, noisy: MaskedBatch, old: TokenLogProbs | None, parts: list[Tensor], totals: dict[str, Any]
    ) -> SequenceOutput | None:
        """The objective of plans whose action is a whole completion, whose states are needed together."""
        if noisy.sequence is None:
            return None
        with torch.no_grad():
            now = self._score_all(noisy, parts)
        return sequence_coefficients(now, noisy, self.loss, old=old, num_rows=totals["num_rows"])

    def _keep_feedback(self, states: MaskedBatch, policy: TokenLogProbs) -> None:
        """Records the training feedback: a token's probability is that of its commit only at its timestep."""
        assert self.trained_probs is not None
        state, position = states.current.nonzero(as_tuple=True)
        self.trained_probs[states.row[state], position] = policy.logp.detach()[state, position].exp()

    def refresh_feedback(self) -> None:
        """Puts the probabilities that the last update gave its tokens into the rollout's feedback."""
        if self.learned is None or self.learned.token_probs is None or self.trained_probs is None:
            return
        scored = self.trained_probs > 0
        self.learned.token_probs = torch.where(scored, self.trained_probs, self.learned.token_probs)

    def _skip(self, what: str, value: Tensor, batch: PromptBatch) -> None:
        """Takes no step but counts one: further updates and the stream of prompts go by that count."""
        self.trained_probs = None
        self.skip_step(what, value, batch, self.learned)
        optimizer: Any = self.optimizers()
        optimizer.step()  # no parameter has a gradient: weights and optimizer stay as they are

    def _log_update(self, outputs: list[LossOutput], noisy: MaskedBatch, norm: Tensor, start: float) -> None:
        parts = self.loss.part_names(self.num_updates, commits=learns_commits(noisy, self.loss))
        figures = update_figures(outputs, noisy, parts, weighted=self.loss.importance_cap is not None)
        self.log("loss/total", figures.pop("loss/total"), prog_bar=True)
        self.log_dict({**figures, "update/grad_norm": norm, "update/seconds": time.perf_counter() - start})
