"""The figures of an update: sums over micro-batches and ranks, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drift.contract import LossOutput, MaskedBatch
from drift.distributed import highest_over_ranks, sum_over_ranks

_COUNTS = ("num_kept", "num_scored", "share")
_OF_TOKENS = ("kl", "entropy", "ratio", "clip_fraction")
_MISMATCH = ("num_tokens", "kl", "weight", "num_capped")


def update_figures(
    outputs: Sequence[LossOutput], noisy: MaskedBatch, parts: Sequence[str], *, weighted: bool
) -> dict[str, Tensor]:
    """What is to be logged of an update, by name, over all ranks.

    Args:
        outputs: of this rank's micro-batches; there may be none.
        noisy: this rank's noisy states.
        parts: names of the parts of the loss.
        weighted: whether tokens had importance weights.

    Returns:
        `loss/*`: `total`, `policy` and `commit` are values of the loss; `kl`, `entropy`, `ratio` and
        `clip_fraction` means over its tokens (over its completions, where those are the actions), by the
        weights that tokens have in it, whatever its normalisation.
        `update/noisy_states`, and where the rollout's probabilities are known, `mismatch/*`, which are
        means over the tokens committed at the noisy states' own timesteps, but for `max_ratio`.
    """
    one = torch.ones((), dtype=torch.float32, device=noisy.row.device)
    found = [output.mismatch for output in outputs if output.mismatch is not None]
    # What is of whole completions comes in an output of its own, apart from the micro-batches'.
    values = {f"loss/{name}": [o.parts[name] for o in outputs if name in o.parts] for name in parts}
    values["loss/total"] = [output.loss.detach() for output in outputs]
    values |= {name: [getattr(output, name) for output in outputs] for name in _COUNTS}
    values |= {f"mismatch/{name}": [getattr(part, name) for part in found] for name in _MISMATCH}
    values["update/noisy_states"] = [one * len(noisy)]
    rows = [torch.stack([0 * one, *(value.float() for value in many)]).sum() for many in values.values()]
    sums = dict(zip(values, sum_over_ranks(torch.stack(rows)), strict=True))
    figures = {name: sums[name] for name in values if name.startswith(("loss/", "update/"))}
    # Of whole completions the ratios are in an output of their own, as means.
    share = torch.where(sums["share"] > 0, sums["share"], 1.0)
    for name in _OF_TOKENS if noisy.sequence is None else _OF_TOKENS[:2]:
        if f"loss/{name}" in figures:
            figures[f"loss/{name}"] = figures[f"loss/{name}"] / share
    figures["loss/kept_share"] = sums["num_kept"] / sums["num_scored"].clamp(min=1)
    if noisy.commit_logp is None:
        return figures
    num_tokens = sums["mismatch/num_tokens"].clamp(min=1)
    figures["mismatch/kl"] = sums["mismatch/kl"] / num_tokens
    figures["mismatch/max_ratio"] = highest_over_ranks(
        torch.stack([one, *(part.max_ratio for part in found)]).max()
    )
    if weighted:
        figures["mismatch/weight"] = sums["mismatch/weight"] / num_tokens
        figures["mismatch/capped_share"] = sums["mismatch/num_capped"] / num_tokens
    return figures
