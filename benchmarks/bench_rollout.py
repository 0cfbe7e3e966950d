"""Rollout speed against a plain baseline and against the bare matrix multiplications that the work needs.

The baseline decodes as published code does: logits and softmax at every position of every pass, batches that
wait for their slowest row. Prints one JSON line, and writes `results/bench_rollout.{json,md,png}`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from common import Stopwatch, chosen, in_turns, make_policy, peak_memory, ratio, report
from torch import Tensor

from drift.contract import Rollout
from drift.models import LLaDA
from drift.randomness import fold, uniform
from drift.rollout import DenoiseConfig, PrefixCache, denoise


class Paced(LLaDA):
    """A policy that is sure of some positions, unsure of others; the prompt's first token says of how many.

    Works without a cache, on prompts of one length.
    """

    def forward(
        self, input_ids: Tensor, attention_mask=None, position_ids=None, cache=None, wanted=None
    ) -> Tensor:
        """Hidden states whose first number is the logit of one token."""
        hidden = super().forward(input_ids, attention_mask, position_ids, cache, wanted)
        sure = uniform(fold(torch.arange(input_ids.shape[1]), 7)) < input_ids[:, :1] / 1000
        hidden[..., 0] = 25.0 * (sure if wanted is None else sure[wanted])
        return hidden


def paced_policy(vocab: int, width: int) -> Paced:
    policy = make_policy(Paced, vocab=vocab, width=width)
    with torch.no_grad():
        policy.head.weight[:, 0] = 0.0
        policy.head.weight[2, 0] = 1.0
    return policy


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    name: str
    rows: int = 8
    at_once: int = 8  # rows of a batch
    prompt: int = 64
    ragged: bool = False  # prompts of an eighth of `prompt` up to it
    completion: int = 128
    steps: int | None = 32  # None: threshold 0.9
    temperature: float = 0.0
    use_cache: bool = False
    vocab: int = 32768
    width: int = 256
    repeats: int | None = None  # rounds; None: as many as are asked for

    def config(self) -> DenoiseConfig:
        """How to decode."""
        threshold = 0.9 if self.steps is None else None
        return DenoiseConfig(
            threshold=threshold,
            steps=self.steps,
            temperature=self.temperature,
            use_cache=self.use_cache,
            horizon=128,
            stop_at_padding=False,
        )

    def prompts(self) -> tuple[Tensor, Tensor]:
        """[N,P] ids and mask."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.vocab, (self.rows, self.prompt), generator=generator)
        lengths = torch.full((self.rows,), self.prompt)
        if self.ragged:
            lengths = torch.linspace(self.prompt // 8, self.prompt, self.rows).long()
        if self.steps is None:
            # From 8 to 128 passes, evenly and in random order.
            shares = torch.linspace(0, 0.97, self.rows)[torch.randperm(self.rows, generator=generator)]
            ids[:, 0] = (1000 * shares).long()
        return ids, torch.arange(self.prompt) >= self.prompt - lengths[:, None]


@torch.no_grad()
def plain_denoise(policy: LLaDA, ids: Tensor, mask: Tensor, length: int, config: DenoiseConfig) -> Tensor:
    """[N,C] int64 completions, as published code makes them: all positions of a pass, all rows of a batch."""
    masks = torch.full((len(ids), length), policy.mask_token_id)
    x = torch.cat((ids, masks), dim=1)
    seen = torch.cat((mask, torch.ones_like(masks, dtype=torch.bool)), dim=1)
    positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)
    quotas = config.quotas(length) if config.threshold is None else None
    for block, first in enumerate(range(ids.shape[1], x.shape[1], config.block_length)):
        last, cache, step = first + config.block_length, None, 0
        while (x[:, first:last] == policy.mask_token_id).any():
            start, stop = 0, x.shape[1]
            if cache is not None:
                start, stop = first, min(last + (config.horizon or length), stop)
            elif config.use_cache:
                cache = PrefixCache(first)
            logits = policy.head(policy(x[:, start:stop], seen[:, :stop], positions[:, start:stop], cache))
            logits[..., policy.mask_token_id] = -torch.inf
            log_probs = logits.log_softmax(dim=-1)
            token = log_probs.argmax(dim=-1)
            if config.temperature > 0:
                noise = torch.empty_like(logits).exponential_().log_()
                token = (logits / config.temperature - noise).argmax(dim=-1)
            prob = log_probs.gather(-1, token[..., None])[..., 0].exp()
            token, prob = token[:, first - start : last - start], prob[:, first - start : last - start]
            masked = x[:, first:last] == policy.mask_token_id
            prob = prob.masked_fill(~masked, -1.0)
            if quotas is None:
                best = torch.zeros_like(masked).scatter_(1, prob.argmax(dim=1, keepdim=True), True)
                chosen = ((prob >= config.threshold) | best) & masked
            else:
                best = prob.topk(quotas[block][step], dim=1).indices
                chosen = torch.zeros_like(masked).scatter_(1, best, True)
            x[:, first:last] = torch.where(chosen, token, x[:, first:last])
            step += 1
    return x[:, ids.shape[1] :]


def plain(policy: LLaDA, case: Case) -> Tensor:
    """The baseline's completions, batch by batch."""
    ids, mask = case.prompts()
    batches = zip(ids.split(case.at_once), mask.split(case.at_once), strict=True)
    return torch.cat([plain_denoise(policy, *batch, case.completion, case.config()) for batch in batches])


def ours(policy: LLaDA, case: Case, *, compiled: bool = False) -> Rollout:
    """Drift's rollout of the same prompts."""
    config = replace(case.config(), compile=compiled)
    seeds = torch.arange(case.rows)
    return denoise(policy, *case.prompts(), case.completion, config, seeds=seeds, batch_size=case.at_once)


class Recorder:
    """The passes of a rollout, as sizes, and where its time goes.

    Args:
        policy: the policy.
        case: what it decodes.
    """

    def __init__(self, policy: LLaDA, case: Case) -> None:
        self.passes: list[tuple[int, int, int]] = []  # rows, positions fed, positions attended to
        self.scored: list[int] = []  # positions of the head
        watch, head = Stopwatch(), policy.head
        module = denoise.__wrapped__.__globals__  # type: ignore[attr-defined]
        sampled = watch.timed("sampling", module["candidates"])
        body = policy.register_forward_pre_hook(self._see)
        hook = head.register_forward_pre_hook(lambda _, args: self.scored.append(len(args[0])))
        timed_body, timed_head = watch.timed("body", policy.forward), watch.timed("head", head.forward)
        with (
            mock.patch.dict(module, candidates=sampled),
            mock.patch.object(policy, "forward", timed_body),
            mock.patch.object(head, "forward", timed_head),
            watch.part("all"),
        ):
            ours(policy, case)
        body.remove()
        hook.remove()
        parts = watch.seconds
        parts["head"] -= parts["sampling"]
        parts["other"] = parts["all"] - parts["body"] - parts["head"] - parts["sampling"]
        self.shares = {p: round(parts[p] / parts["all"], 3) for p in ("body", "head", "sampling", "other")}

    def _see(self, _: LLaDA, args: tuple[Any, ...]) -> None:
        ids, _, _, cache, _ = args
        before = cache.length if cache is not None and cache.opened else 0
        self.passes.append((*ids.shape, before + ids.shape[1]))

    @torch.no_grad()
    def matmuls(self, policy: LLaDA) -> None:
        """Nothing but the multiplications of the recorded passes, with the policy's own weights.

        What follows the last attention, and the head, are needed at the masked positions alone.
        """
        heads = policy.config.n_heads
        for (rows, fed, keys), scored in zip(self.passes, self.scored, strict=True):
            x = torch.ones(rows * fed, policy.config.d_model)
            query = torch.ones(rows, heads, fed, policy.head_width)
            key = torch.ones(rows, heads, keys, policy.head_width)
            for number, block in enumerate(policy.blocks, start=1):
                for layer in (block.q_proj, block.k_proj, block.v_proj):
                    layer(x)
                (query @ key.mT) @ key
                if number == len(policy.blocks):
                    x = x[:scored]
                for layer in (block.attn_out, block.up_proj):
                    layer(x)
                block.ff_out(block.ff_proj(x))
            torch.nn.functional.linear(x, policy.head.weight)


def measure(case: Case, repeats: int, *, compiled: bool = False) -> dict[str, Any]:
    """Everything about one case."""
    make = paced_policy if case.steps is None else make_policy
    policy = make(vocab=case.vocab, width=case.width)
    recorder = Recorder(policy, case)
    variants: dict[str, Any] = {"plain": partial(plain, policy, case), "drift": partial(ours, policy, case)}
    variants["matmuls"] = partial(recorder.matmuls, policy)
    if compiled:
        variants["compiled"] = partial(ours, policy, case, compiled=True)
        variants["compiled"]()
    found: dict[str, tuple[int, Any]] = {}

    def watched(name: str, run: Any) -> None:
        found[name] = peak_memory(run)

    times = in_turns({name: partial(watched, name, run) for name, run in variants.items()}, repeats)
    memory, rollout = found["drift"]
    plain_memory, completions = found["plain"]
    result = {
        "case": case.name,
        "plain / drift": round(ratio(times, "plain", "drift"), 2),
        "matmuls / drift": round(ratio(times, "matmuls", "drift"), 2),
        "plain / compiled": round(ratio(times, "plain", "compiled"), 2) if compiled else None,
        "matmuls / compiled": round(ratio(times, "matmuls", "compiled"), 2) if compiled else None,
        "tokens/s": round(case.rows * case.completion / min(times["drift"]), 1),
        "plain tokens/s": round(case.rows * case.completion / min(times["plain"]), 1),
        "peak MB": round(memory / 2**20),
        "plain peak MB": round(plain_memory / 2**20),
        **recorder.shares,
        "forwards": rollout.num_forwards,
        "passes of a row": f"{int(rollout.num_timesteps.min())} to {int(rollout.num_timesteps.max())}",
    }
    if case.temperature == 0:
        same = (rollout.completion_ids == completions).float().mean()
        result["same tokens"] = f"{same:.2%}"
    else:
        result["same tokens"] = "drawn otherwise"
    print(result, flush=True)
    return result


TARGETS = [
    Case(name="static"),
    Case(name="static, cache", use_cache=True),
    Case(name="static, temperature 1", temperature=1.0),
    Case(name="static, temperature 1, cache", temperature=1.0, use_cache=True),
    Case(name="threshold, 64 rows", rows=64, steps=None, repeats=1),
]
SMALL = Case(name="", completion=64, steps=8, repeats=1)
GRID = [
    replace(SMALL, name=f"V {vocab}, {rows} rows{ragged * ', ragged'}", vocab=vocab, rows=rows, ragged=ragged)
    for vocab in (512, 32768, 126464)
    for rows, ragged in ((8, False), (32, False), (32, True))
]
GRID = [replace(case, at_once=case.rows, prompt=256 if case.ragged else 64) for case in GRID]
GROWTH = [replace(SMALL, name=f"completion {n}", completion=n, steps=n // 8) for n in (64, 128, 256)]
GROWTH += [replace(SMALL, name=f"passes {n}", steps=n) for n in (8, 16, 32)]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: whether it runs")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of most target cases")
    parser.add_argument(
        "--only", choices=("targets", "grid", "growth"), help="one table, in place of the recorded one"
    )
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks, too")
    options = parser.parse_args()
    groups = chosen({"targets": TARGETS, "grid": GRID, "growth": GROWTH}, options.only)
    repeats = 1 if options.quick else options.repeats
    if options.quick:
        groups = {
            name: [replace(c, vocab=min(c.vocab, 1024), width=64, rows=min(c.rows, 16)) for c in cases[:5]]
            for name, cases in groups.items()
        }
    found = {
        name: [measure(c, c.repeats or repeats, compiled=options.compile) for c in cases]
        for name, cases in groups.items()
    }
    report("rollout", found, quick=options.quick)


if __name__ == "__main__":
    main()
