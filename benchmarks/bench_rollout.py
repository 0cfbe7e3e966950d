"""Rollout speed against a plain baseline: full-sequence logits and softmax at every position, at every step.

Both decode the same prompts with the same static schedule, without the cache, in turn; the figure is the
ratio of their median seconds. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor

from drift.models import LLaDA, LLaDAConfig
from drift.rollout import DenoiseConfig, denoise


@torch.no_grad()
def plain_denoise(policy: LLaDA, prompt_ids: Tensor, length: int, config: DenoiseConfig) -> Tensor:
    """[N,C] int64, greedy completions as published code makes them."""
    masks = torch.full((len(prompt_ids), length), policy.mask_token_id)
    x = torch.cat((prompt_ids, masks), dim=1)
    offset = prompt_ids.shape[1]
    for block, quotas in enumerate(config.quotas(length)):
        window = slice(offset + block * config.block_length, offset + (block + 1) * config.block_length)
        for quota in quotas:
            logits = policy.logits(x)
            logits[..., policy.mask_token_id] = -torch.inf
            prob, token = logits.softmax(dim=-1).max(dim=-1)
            masked = x[:, window] == policy.mask_token_id
            best = prob[:, window].masked_fill(~masked, -1).topk(quota, dim=1).indices
            x[:, window] = x[:, window].scatter(1, best, token[:, window].gather(1, best))
    return x[:, offset:]


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 8), ("prompt", 64), ("completion", 128), ("vocab", 8192), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=32, help="denoising steps of a completion")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    policy = LLaDA(
        LLaDAConfig(
            d_model=options.width,
            n_heads=8,
            n_layers=6,
            mlp_hidden_size=3 * options.width,
            vocab_size=options.vocab,
            init_std=0.2,
            mask_token_id=1,
            pad_token_id=0,
        )
    ).eval()
    prompt_ids = torch.randint(2, options.vocab, (options.rows, options.prompt))
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    config = DenoiseConfig(block_length=32, threshold=None, steps=options.steps, stop_at_padding=False)

    def ours() -> Tensor:
        return denoise(policy, prompt_ids, prompt_mask, options.completion, config).completion_ids

    def plain() -> Tensor:
        return plain_denoise(policy, prompt_ids, options.completion, config)

    same = bool((ours() == plain()).all())
    times = [(seconds(plain), seconds(ours)) for _ in range(options.repeats)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result = {
        "benchmark": "rollout",
        "same_completions": same,
        "ratio": round(medians[0] / medians[1], 2),
        "plain_seconds": round(medians[0], 3),
        "drift_seconds": round(medians[1], 3),
        "config": vars(options),
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": platform.machine(),
        },
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
