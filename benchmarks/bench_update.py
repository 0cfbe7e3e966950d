"""Update speed and memory against a plain baseline and the bare matrix multiplications that the work needs.

The baseline scores as published code does: logits and a float32 log-softmax at every position of every
noisy state of every row, of the reference too. Prints one JSON line, and writes
`results/bench_update.{json,md,png}`.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import Any

import torch
from common import chosen, ratio, report, seconds
from torch import Tensor
from updates import Case, Matmuls, Plain, ours, peak_bytes


def measure(case: Case, repeats: int, *, memory: bool = True) -> dict[str, Any]:
    """Everything about one case."""
    plain, matmuls = Plain(case), Matmuls(case)
    expected = plain.step(keep=True)
    times: dict[str, list[float]] = {"plain": [], "drift": [], "matmuls": [], "equal": []}
    error, parts = 0.0, {}
    equal = None if case.equal is None else replace(case, prompts=(case.equal, case.equal))
    for _ in range(repeats):
        times["plain"].append(seconds(plain.step))
        if equal is not None:
            times["equal"].append(ours(equal).seconds)
        watch = ours(case)
        times["drift"].append(watch.seconds)
        times["matmuls"].append(seconds(matmuls.step))
        error = max(error, relative(watch.gradients, expected))
        parts = {name: part / watch.seconds for name, part in watch.parts.items()}
    tokens = sum(case.noisy(plain.policy).attention_mask.sum(dim=1).tolist())
    least = {name: min(values, default=0.0) for name, values in times.items()}
    result = {
        "case": case.name,
        "plain / drift": round(least["plain"] / least["drift"], 2),
        "matmuls / drift": round(least["matmuls"] / least["drift"], 2),
        "median plain / drift": round(ratio(times, "plain", "drift"), 2),
        "median matmuls / drift": round(ratio(times, "matmuls", "drift"), 2),
        "tokens/s": round(tokens / least["drift"]),
        "plain tokens/s": round(tokens / least["plain"]),
        "seconds": round(least["drift"], 2),
        **{name: round(share, 3) for name, share in parts.items()},
        "other": round(1 - sum(parts.values()), 3),
        "gradient error": float(f"{error:.1e}"),
        "ragged / equal lengths": "" if equal is None else round(ratio(times, "drift", "equal"), 2),
        "head MB": round(plain.policy.head.weight.nbytes / 2**20),
    }
    if memory:
        peak, plain_peak = ours(case, memory=True).peak, peak_bytes(plain.step)
        result |= {
            "peak MB": round(peak / 2**20),
            "plain peak MB": round(plain_peak / 2**20),
            "peak / plain": round(peak / plain_peak, 3),
        }
    print(result, flush=True)
    return result


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference in that of what is expected."""
    difference = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    return float(difference / torch.stack([b.norm() for b in expected]).norm())


TARGETS = [
    Case(name="no reference"),
    Case(name="reference", beta=0.01),
    Case(name="no reference, tau 0.6", tau=0.6),
    Case(name="half of the groups without spread", spread=2),
    Case(name="8 states at once", states=8),
    Case(name="V 126464", vocab=126464),
    # Of 132 tokens on average.
    Case(name="prompts of 8 to 256", prompts=(8, 256), equal=132),
]
GRID = [
    Case(
        name=f"V {vocab}, {rows} rows{ragged * ', ragged'}", vocab=vocab, rows=rows, completion=64, states=32
    )
    for vocab in (512, 32768, 126464)
    for rows, ragged in ((8, False), (32, False), (32, True))
    # Ragged rows of the largest vocabulary would take the baseline more than 24 GB.
    if not (ragged and vocab > 100_000)
]
GRID = [replace(case, prompts=(32, 256) if "ragged" in case.name else (64, 64)) for case in GRID]
GROWTH = [Case(name=f"completion {n}", completion=n) for n in (64, 128, 256)]
GROWTH += [Case(name=f"k {k}", completion=64, timesteps=(2, 6, 10, 14)[:k]) for k in (1, 2, 4)]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: whether it runs")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the target cases")
    parser.add_argument(
        "--only", choices=("targets", "grid", "growth"), help="one table, in place of the recorded one"
    )
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    groups = chosen({"targets": TARGETS, "grid": GRID, "growth": GROWTH}, options.only)
    if options.quick:
        groups = {
            name: [replace(c, vocab=min(c.vocab, 1024), width=64, completion=16) for c in cases[:4]]
            for name, cases in groups.items()
        }
    repeats = {"targets": 1 if options.quick else options.repeats}
    found = {
        name: [measure(c, repeats.get(name, 1), memory=name == "targets") for c in cases]
        for name, cases in groups.items()
    }
    report("update", found, quick=options.quick)


if __name__ == "__main__":
    main()
