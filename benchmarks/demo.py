"""The demo: trains the quickstart, tests base and trained policy, and prints their accuracies side by side.

Run it with `make demo`. The last line is for machines: `DEMO base=0.281 trained=0.957 n=512 seconds=97`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs the three commands and prints what came out."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seed", type=int, default=0, help="of the rollouts and of all puzzles")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; not given: the config's")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="for logs and checkpoints")
    arguments = parser.parse_args()
    folder = arguments.folder / f"seed_{arguments.seed}"
    base = evaluate(folder / "base", arguments.seed)
    start = time.perf_counter()
    steps = [] if arguments.steps is None else ["--trainer.max_steps", str(arguments.steps)]
    drift("fit", folder / "fit", arguments.seed, *steps)
    seconds = time.perf_counter() - start
    trained = evaluate(folder / "trained", arguments.seed, folder / "fit" / "checkpoints" / "last.ckpt")
    report(base, trained, folder, seconds)


def drift(command: str, folder: Path, seed: int, *arguments: str) -> None:
    """Runs one drift command on the quickstart, its logs under `folder`; stops the demo where it fails."""
    logger = "--trainer.logger.init_args"
    places = [f"{logger}.save_dir", str(folder.parent), f"{logger}.name", ""]
    places += [f"{logger}.version", folder.name]
    seeds = ["--seed_everything", str(seed), "--rollout.seed", str(seed)]
    seeds += ["--data.task.init_args.seed", str(seed)]
    call = ["drift", command, "--config", "quickstart", *places, *seeds, *arguments]
    print("$", " ".join(call[:4] + list(arguments)), flush=True)
    subprocess.run([sys.executable, "-m", *call], check=True)


def evaluate(folder: Path, seed: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """The test results of the base policy, or of a checkpoint."""
    path = folder / "test.json"
    chosen = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    drift("test", folder, seed, "--summary.path", str(path), *chosen)
    return json.loads(path.read_text(encoding="utf-8"))["results"][0]


def report(base: dict[str, Any], trained: dict[str, Any], folder: Path, seconds: float) -> None:
    """Prints the comparison."""
    num, results = int(base["num"]), (base, trained)
    print(f"\n4x4 sudoku, {num} held-out puzzles, greedy answers")
    print(f"{'':22}{'base policy':>24}{'trained with RLDF':>24}")
    for title, cells in (
        ("accuracy", [f"{r['accuracy']:.1%}" for r in results]),
        ("  95 % interval", [f"{r['accuracy_low']:.1%} to {r['accuracy_high']:.1%}" for r in results]),
        ("timesteps per answer", [f"{r['timesteps']:.2f}" for r in results]),
        ("tokens per forward", [f"{r['tokens_per_forward']:.2f}" for r in results]),
    ):
        print(f"{title:22}{cells[0]:>24}{cells[1]:>24}")
    print(f"\ncurves and samples   .venv/bin/tensorboard --logdir {folder}")
    fit = ".venv/bin/drift fit --config"
    print(f"another sampler      {fit} quickstart --model.sampler Uniform --model.sampler.k 2")
    collapse = "--model.optimizer.lr 5e-4 --model.loss.beta 0 --trainer.max_steps 110"
    print(f"too high a rate      {fit} quickstart {collapse}")
    print(f"your own model       {fit} llada_math --model.policy FOLDER")
    accuracies = f"base={base['accuracy']:.3f} trained={trained['accuracy']:.3f}"
    print(f"DEMO {accuracies} n={num} seconds={seconds:.0f}")


if __name__ == "__main__":
    main()
