"""Error of the policy gradient that each sampler estimates, against the forward passes that it takes.

A 4 x 4 sudoku policy is rolled out, with its threshold, two tokens a timestep, and one after another; rows of
groups whose rewards are equal have no gradient and are left out. The yardstick is the gradient over all
timesteps under the same loss: `exact` sums the tokens that each timestep committed, over the trajectory,
which is the policy gradient itself; `RLDF` takes the mean of all masked tokens with a probability of 0.6 or
more, per state and then over the states of a row. Errors are norms of differences in the norm of the full
gradient, over many plans of the same rollouts. Prints one JSON line, and writes
`results/bench_estimators.{json,md,png}`.

A policy that solves about half of its puzzles, which the shipped one does not, is made by `drift sft --config
sudoku_base --data.task.init_args.right_share 1.0 --data.task.init_args.blanks [8,12] --trainer.max_steps 450
--trainer.val_check_interval 450 --export.folder tuned`; `--policy tuned --blanks 8 12 --prompts 48 --name
bench_estimators_tuned` measures it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import environment, table, write
from gradients import EXACT, PAPER, Gradients, Objective, judged_rollout

from drift.models import load_policy, resolve_folder
from drift.rollout import DenoiseConfig
from drift.samplers import (
    AllMaskSampler,
    CoupledElboSampler,
    CoupledMaskSampler,
    ProportionalSampler,
    QuadratureElboSampler,
    RandomMaskSampler,
    SandwichedSampler,
    StepSampler,
    TimestepSampler,
    TraceSampler,
    UniformSampler,
    WeightedSampler,
)

DECODING = {
    "threshold 0.9": DenoiseConfig(block_length=16, threshold=0.9, temperature=1.0),
    "two tokens a timestep": DenoiseConfig(block_length=16, threshold=None, steps=8, temperature=1.0),
    "one token a timestep": DenoiseConfig(block_length=16, threshold=None, steps=16, temperature=1.0),
}
DRAWS = (1, 2, 4, 8)
Rows = list[dict[str, Any]]


def samplers(k: int, objective: Objective) -> dict[str, TimestepSampler]:
    """Those that draw k of the rollout's timesteps, or up to k."""
    return {
        "uniform": UniformSampler(k),
        "uniform, corrected": UniformSampler(k, importance_correction=True),
        "weighted (RLDF)": WeightedSampler(k),
        "weighted, corrected": WeightedSampler(k, importance_correction=True),
        "step (AGRPO)": StepSampler(k),
        "proportional": ProportionalSampler(k, floor=0.03 if objective.current_only else 0.3),
    }


def other_samplers(objective: Objective) -> dict[tuple[str, int | str], TimestepSampler]:
    """Those whose noisy states the rollout did not see, by name and k; most estimate something else."""
    found: dict[tuple[str, int | str], TimestepSampler] = {
        ("coupled masks (coupled-GRPO)", "-"): CoupledMaskSampler(),
        ("all masked (d1)", "-"): AllMaskSampler(),
    }
    found |= {(f"trace, {shrink} merged (TraceRL)", "-"): TraceSampler(shrink) for shrink in (2, 4, 8)}
    found |= {("random masks (d1)", k): RandomMaskSampler(k) for k in DRAWS}
    if objective is EXACT:
        found |= {("ELBO, coupled pairs (ESPO)", k): CoupledElboSampler(k) for k in DRAWS}
        found |= {("ELBO, quadrature (GDPO)", k): QuadratureElboSampler(k) for k in DRAWS}
        found |= {("bounds (SPG)", k): SandwichedSampler(k) for k in DRAWS}
    return found


def measure(gradients: Gradients, num_plans: int) -> tuple[Rows, Rows]:
    """The figures of all samplers under one objective: timesteps of the rollout, and other states."""
    drawn = []
    for k in DRAWS:
        for name, sampler in samplers(k, gradients.objective).items():
            # From fewer tokens than the objective has, its states have gradients of their own.
            plan = sampler.plan(gradients.rollout)
            other = plan.current_only and not gradients.objective.current_only
            errors = gradients.errors_of_others if other else gradients.errors
            drawn.append({"sampler": name, "k": k} | errors(sampler, num_plans))
    others = []
    for (name, k), sampler in other_samplers(gradients.objective).items():
        found = gradients.errors_of_others(sampler, max(num_plans // 16, 2))
        others.append({"sampler": name, "k": k} | found)
    return _rounded(drawn), _rounded(others)


def _rounded(rows: Rows) -> Rows:
    return [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="sudoku_base", help="the shipped one, or a folder")
    parser.add_argument("--name", default="bench_estimators", help="of the files of results")
    parser.add_argument("--blanks", type=int, nargs=2, default=(6, 9), help="fewest and most of a puzzle")
    parser.add_argument("--prompts", type=int, default=64, help="puzzles, 8 completions each")
    parser.add_argument("--plans", type=int, default=64, help="of every sampler")
    parser.add_argument("--quick", action="store_true", help="few of both: the figures mean nothing")
    options = parser.parse_args()
    prompts, plans = (8, 4) if options.quick else (options.prompts, options.plans)
    policy, found = load_policy(resolve_folder(options.policy)).eval(), []
    for name, decode in DECODING.items():
        rollout = judged_rollout(policy, decode, prompts, (options.blanks[0], options.blanks[1]))
        assert rollout.num_timesteps is not None
        timesteps = round(float(rollout.num_timesteps.float().mean()), 2)
        for objective in (EXACT, PAPER):
            drawn, others = measure(Gradients(policy, rollout, objective), plans)
            case = {"decoding": name, "objective": objective.name, "rows": len(rollout.completion_ids)}
            found.append(case | {"timesteps": timesteps, "drawn": drawn, "others": others})
    result = {"benchmark": "estimators", "quick": options.quick, "prompts": prompts, "plans": plans}
    result |= {
        "policy": Path(options.policy).name,
        "blanks": list(options.blanks),
        "cases": found,
        "environment": environment(),
    }
    write(options.name, result, _markdown(result), partial(_draw, found), quick=options.quick)


_HEAD = """# Estimators of the policy gradient

`python benchmarks/bench_estimators.py --policy {policy} --blanks {blanks[0]} {blanks[1]}`, {prompts} puzzles
with 8 completions each, {plans} plans of every sampler, {environment}

`passes`: noisy states fed per row. `error`: root mean square of the estimates' distance from the full
gradient; `bias` and `deviation`: its two parts; all in the full gradient's norm. `cosine`: mean
cosine with it.
"""


def _markdown(result: Mapping[str, Any]) -> str:
    text = _HEAD.format(**result)
    for case in result["cases"]:
        text += f"\n## {case['decoding'].capitalize()}, {case['objective']}\n\n{case['rows']} rows with an "
        text += f"advantage, {case['timesteps']} timesteps each.\n\n{table(case['drawn'])}\n\n"
        text += f"Other states; most estimate something else:\n\n{table(case['others'])}\n"
    return text


def _draw(found: Sequence[Mapping[str, Any]], figure: Any) -> None:
    """Error against passes, one panel for each objective, of the longest trajectories."""
    panels = figure.subplots(1, 2, sharey=True)
    for panel, case in zip(panels, found[-2:], strict=True):
        for name in samplers(1, EXACT):
            rows = [row for row in case["drawn"] if row["sampler"] == name]
            panel.plot([row["passes"] for row in rows], [row["error"] for row in rows], "o-", label=name)
        panel.set_title(f"{case['decoding']}, {case['objective']}", fontsize=9)
        panel.set_xlabel("forward passes per row")
        panel.set_xscale("log", base=2)
    panels[0].set_ylabel("relative error of the gradient")
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=8)


if __name__ == "__main__":
    main()
