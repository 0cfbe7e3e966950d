"""Three ways to take an update of the same noisy states: drift, a plain one, bare matrix multiplications."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import make_policy
from lightning import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from drift.advantages import group_advantages
from drift.contract import MaskedBatch, Problem, PromptBatch, Rollout, TimestepPlan, TokenLogProbs
from drift.losses import LossConfig, kept_tokens, rldf_loss
from drift.masking import masked_batch
from drift.models import LLaDA, load_policy
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.samplers.base import TimestepSampler, sequential_plan
from drift.token_scores import tile_width

GROUP = 4
# Small, so that every round starts from the same weights.
OPTIMIZER = OptimizerConfig(lr=1e-12, gradient_clip=1e9)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement; of 16 timesteps, those at which 7/8, 5/8, 3/8 and 1/8 of a row are masked."""

    name: str
    rows: int = 8
    prompts: tuple[int, int] = (64, 64)  # shortest and longest, evenly spread
    equal: int | None = None  # also time prompts that all have this length
    completion: int = 128
    timesteps: tuple[int, ...] = (2, 6, 10, 14)
    spread: int = 1  # one group in this many has rewards that differ
    beta: float = 0.0
    tau: float = 0.0
    states: int = 10**6  # of a micro-batch
    vocab: int = 32768
    width: int = 256

    @property
    def loss(self) -> LossConfig:
        """Settings of the loss."""
        return LossConfig(tau=self.tau, beta=self.beta)

    def batch(self) -> PromptBatch:
        """Prompts with their rollout."""
        generator = torch.Generator().manual_seed(1)
        draw = partial(torch.randint, 3, self.vocab, generator=generator)
        lengths = torch.linspace(*self.prompts, self.rows).long()
        prompt_mask = torch.arange(self.prompts[1]) >= self.prompts[1] - lengths[:, None]
        order = torch.rand(self.rows, self.completion, generator=generator).argsort(dim=1).argsort(dim=1)
        rewards = torch.rand(self.rows // GROUP, GROUP, generator=generator)
        rewards[torch.arange(len(rewards)) % self.spread != 0] = 0.5
        rollout = Rollout(
            prompt_ids=draw((self.rows, self.prompts[1])).masked_fill(~prompt_mask, 0),
            prompt_mask=prompt_mask,
            completion_ids=draw((self.rows, self.completion)),
            completion_mask=torch.ones(self.rows, self.completion, dtype=torch.bool),
            step_map=order * 16 // self.completion,
            num_timesteps=torch.full((self.rows,), 16),
            rewards=rewards.flatten()[:, None],
        )
        firsts = torch.arange(0, self.rows, GROUP)
        return PromptBatch(
            prompt_ids=rollout.prompt_ids[firsts],
            prompt_mask=prompt_mask[firsts],
            problems=[Problem(prompt="", answer="") for _ in firsts],
            positions=firsts,
            rollout=rollout,
        )

    def noisy(self, policy: LLaDA) -> MaskedBatch:
        """All noisy states, rows without an advantage too."""
        rollout = self.batch().rollout
        assert rollout is not None and rollout.rewards is not None  # noqa: PT018
        rollout.advantages = group_advantages(rollout.rewards[:, 0], GROUP)
        return masked_batch(rollout, Timesteps(self.timesteps).plan(rollout), policy.mask_token_id)


class Timesteps(TimestepSampler):
    """The same timesteps of every row."""

    def __init__(self, timesteps: tuple[int, ...]) -> None:
        self.timesteps = timesteps

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """As many noisy states a row as there are timesteps."""
        timesteps = torch.tensor(self.timesteps)[:, None].expand(-1, len(rollout.completion_ids))
        return sequential_plan(rollout, timesteps, torch.ones(timesteps.shape))


@cache
def folder(vocab: int, width: int) -> Path:
    """A folder with a random policy."""
    path = Path(tempfile.mkdtemp(prefix="bench_update_"))
    make_policy(vocab=vocab, width=width).save_pretrained(path)
    return path


class Watch(Callback):
    """Seconds and parts of the last step, its gradients and the most bytes that it had allocated."""

    def __init__(self, last: int, *, memory: bool) -> None:
        self.last, self.memory = last, memory
        self.seconds = 0.0
        self.peak = 0
        self.parts = {"body": 0.0, "head": 0.0}
        self.gradients: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Times body and head; their backward passes meet at the states that the head is given."""
        policy, step = pl_module.policy, pl_module.training_step
        backward = pl_module.manual_backward
        self.began = 0.0

        def timed_backward(loss: Tensor) -> None:
            self.began = time.perf_counter()
            backward(loss)
            self.parts["body"] += time.perf_counter() - self.began

        def between(_: Tensor) -> None:
            now = time.perf_counter()
            self.parts["head"] += now - self.began
            self.began = now

        for part, module in (("body", policy), ("head", policy.head)):
            module.forward = self._timed(part, module.forward, between if part == "head" else None)
        pl_module.manual_backward = timed_backward

        def timed_step(*args: Any) -> None:
            self.parts = dict.fromkeys(self.parts, 0.0)
            if self.memory and trainer.global_step == self.last - 1:
                self.peak = peak_bytes(partial(step, *args))
            else:
                start = time.perf_counter()
                step(*args)
                self.seconds = time.perf_counter() - start

        pl_module.training_step = timed_step

    def _timed(self, part: str, forward: Callable[..., Any], hook: Callable[[Tensor], None] | None):
        def run(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            if hook is not None and states.requires_grad:
                states.register_hook(hook)
            found = forward(states, *args, **kwargs)
            self.parts[part] += time.perf_counter() - start
            return found

        return run

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Keeps the gradients of the first step."""
        if not self.gradients and not self.memory:
            self.gradients = [p.grad.clone() for p in pl_module.policy.parameters()]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator gave out at one time, beyond those it had given out before."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(sizes.cumsum(dim=0).max())


def ours(case: Case, *, memory: bool = False) -> Watch:
    """Drift's second update: in the first, memory and optimizer are made ready."""
    seed_everything(0, verbose=False)
    path = str(folder(case.vocab, case.width))
    module = RLDFModule(
        path,
        sampler=Timesteps(case.timesteps),
        loss=case.loss,
        optimizer=OPTIMIZER,
        micro_batch_size=case.states,
    )
    watch = Watch(2, memory=memory)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([case.batch(), case.batch()], batch_size=None))
    return watch


class Plain:
    """The baseline: every row, logits and log-softmax at every position, micro-batches as large as ours."""

    def __init__(self, case: Case) -> None:
        path = folder(case.vocab, case.width)
        self.case, self.policy = case, load_policy(path)
        self.reference = load_policy(path).requires_grad_(False) if case.beta else None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=OPTIMIZER.lr, weight_decay=0.0)
        self.noisy = case.noisy(self.policy)

    def logprobs(self, policy: LLaDA, states: MaskedBatch) -> TokenLogProbs:
        """[M,C] as published code computes them."""
        logits = policy.logits(states.input_ids, states.attention_mask)
        logits[..., policy.mask_token_id] = -torch.inf
        length = states.targets.shape[1]
        found = logits.float().log_softmax(dim=-1)[:, -length:].gather(-1, states.targets[..., None])[..., 0]
        return TokenLogProbs(logp=torch.where(states.scored, found, 0.0))

    def step(self, *, keep: bool = False) -> list[Tensor]:
        """One update; its gradients where they are to be kept."""
        states = torch.arange(len(self.noisy)).split(self.case.states)
        totals = {}
        if self.case.tau == 0:
            # Rows without a gradient are computed here, but do not count: the loss is drift's.
            counts = self.noisy.scored.sum(dim=1).float()
            counts = counts if self.case.beta else counts * (self.noisy.advantages != 0)
            kept = torch.zeros(self.noisy.num_slots).index_add(0, self.noisy.slot, counts)
            totals = {"num_kept": kept, "num_rows": self.case.rows}
        for part in states:
            noisy = self.noisy.select(part)
            reference = None
            if self.reference is not None:
                with torch.no_grad():
                    reference = self.logprobs(self.reference, noisy)
            policy = self.logprobs(self.policy, noisy)
            rldf_loss(policy, noisy, self.case.loss, reference=reference, **totals).loss.backward()
        gradients = [p.grad.clone() for p in self.policy.parameters()] if keep else []
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), OPTIMIZER.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gradients


class Matmuls:
    """Nothing but the multiplications that an update needs, with the policy's own weights."""

    def __init__(self, case: Case) -> None:
        self.case, self.policy = case, load_policy(folder(case.vocab, case.width))
        noisy = case.noisy(self.policy)
        if not case.beta:
            noisy = noisy.select((noisy.advantages != 0).nonzero()[:, 0])
        self.lengths = noisy.attention_mask.sum(dim=1).tolist()
        self.scored = int(noisy.scored.sum())
        # With random weights no other token has a probability of tau.
        certain = TokenLogProbs(logp=torch.full(noisy.targets.shape, -torch.inf))
        self.kept = int(kept_tokens(certain, noisy, case.tau).sum())

    @torch.no_grad()
    def step(self) -> None:
        """Forward and backward passes, of the reference forward alone."""
        for length in dict.fromkeys(self.lengths):
            rows = self.lengths.count(length)
            scored = self.scored * rows // len(self.lengths)
            self._body(rows, length, scored, backward=True)
            if self.case.beta:
                self._body(rows, length, scored, backward=False)
        self._head(self.scored, backward=False)
        if self.case.beta:
            self._head(self.scored, backward=False)
        self._head(self.kept, backward=True)

    def _body(self, rows: int, length: int, scored: int, *, backward: bool) -> None:
        heads = self.policy.config.n_heads
        query = torch.ones(rows * heads, length, self.policy.head_width)
        for number, block in enumerate(self.policy.blocks, start=1):
            for name, layer in block.named_children():
                if isinstance(layer, torch.nn.Linear):
                    # After the last attention the scored positions alone are needed.
                    end = number == len(self.policy.blocks) and name not in ("q_proj", "k_proj", "v_proj")
                    x = torch.ones(scored if end else rows * length, layer.in_features)
                    y = layer(x)
                    if backward:
                        y @ layer.weight
                        y.t() @ x
            scores = query @ query.mT
            scores @ query
            if backward:
                # Gradients of values, of scores, of queries and of keys.
                scores.mT @ query
                query @ query.mT
                scores @ query
                scores.mT @ query

    def _head(self, rows: int, *, backward: bool) -> None:
        weight, states = self.policy.head.weight, torch.ones(rows, self.policy.config.d_model)
        width = tile_width(rows, len(weight), on_cpu=True)
        gradient = torch.empty_like(weight) if backward else None
        logits = torch.ones(rows, width)
        for first in range(0, len(weight), width):
            part = weight[first : first + width]
            if gradient is None:
                torch.mm(states, part.t(), out=logits[:, : len(part)])
            else:
                logits[:, : len(part)] @ part
                torch.mm(logits[:, : len(part)].t(), states, out=gradient[first : first + width])
