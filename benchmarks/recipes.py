"""The recipes that `bench_learning` compares: estimators, likelihoods, and how rollouts are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from drift import samplers
from drift.samplers import TimestepSampler

# Every run keeps this average of its weights, whatever its recipe: both are measured.
EMA_DECAY = 0.98


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs between runs on a subject: the estimator, the likelihood, and how rollouts are made.

    Args:
        sampler: class in drift.samplers.
        arguments: of the sampler.
        loss: settings that differ from those of the paper, whose KL is left out.
        decode: rollout settings that differ from threshold 0.9 at temperature 1.
        optimizer: settings that differ from those of the paper.
        num_updates: of each rollout.
        group: completions of a prompt.
    """

    sampler: str = "WeightedSampler"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    decode: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    num_updates: int = 1
    group: int = 8

    def make_sampler(self) -> TimestepSampler:
        """The timestep sampler."""
        return getattr(samplers, self.sampler)(**self.arguments)


_SAMPLE, _EXACT = {"normalisation": "sample"}, {"tau": None, "normalisation": "trajectory"}
_DRAWN = {"commit": "stochastic", "width": 0.03}

# Those of others under the settings of RLDF's paper, but for the normalisation that an estimator is made for.
RECIPES = {
    "weighted (RLDF)": Recipe(),
    "uniform": Recipe(sampler="UniformSampler"),
    "full": Recipe(sampler="FullSampler", loss=_SAMPLE),
    "weighted, corrected": Recipe(arguments={"importance_correction": True}, loss=_SAMPLE),
    "proportional": Recipe(sampler="ProportionalSampler", arguments={"floor": 0.3}, loss=_SAMPLE),
    "step (AGRPO)": Recipe(sampler="StepSampler", loss=_EXACT),
    "trace, 2 merged (TraceRL)": Recipe(sampler="TraceSampler", arguments={"shrink": 2}, loss=_SAMPLE),
    "random masks (d1, UniGRPO)": Recipe(sampler="RandomMaskSampler"),
    "all masked (d1)": Recipe(sampler="AllMaskSampler"),
    "coupled masks (coupled-GRPO)": Recipe(sampler="CoupledMaskSampler"),
    "ELBO, coupled (ESPO)": Recipe(sampler="CoupledElboSampler", arguments={"k": 2}),
    "ELBO, quadrature (GDPO)": Recipe(sampler="QuadratureElboSampler", arguments={"k": 2}),
    "bounds (SPG)": Recipe(sampler="SandwichedSampler", arguments={"k": 2}),
    "exact, with commits": Recipe(sampler="FullSampler", loss=_EXACT, decode=_DRAWN),
    # configs/rldf_commit.yaml
    "rldf_commit": Recipe(
        sampler="ProportionalSampler",
        arguments={"floor": 0.3},
        loss={"normalisation": "trajectory", "commit_weight": 0.3},
        decode={**_DRAWN, "temperature": 0.5},
        optimizer={"warmup_steps": 10, "ema_decay": EMA_DECAY},
    ),
}
BEST, PAPER = "rldf_commit", "weighted (RLDF)"
# What its other settings do by themselves: no draws, and so no likelihood of commits.
RECIPES["rldf_commit, tokens alone"] = replace(
    RECIPES[BEST], loss={"normalisation": "trajectory"}, decode={"temperature": 0.5}
)
# The other likelihood: rldf_commit with the timesteps of another sampler, wherever those are replayed.
RECIPES |= {
    f"{name}, commits": replace(RECIPES[BEST], sampler=token.sampler, arguments=token.arguments)
    for name, token in RECIPES.items()
    if token.make_sampler().replays and token.sampler != RECIPES[BEST].sampler and not token.decode
}
