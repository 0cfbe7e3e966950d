"""The method in plain loops, slow and easy to check by eye: what the fast code is compared with.

Nothing here comes from the stages that it checks. Numbers that carry a gradient are 0-dimensional tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noisy_state(
    completion: list[int], step_map: list[int], timestep: int, mask_token_id: int
) -> tuple[list[int], list[bool], list[bool]]:
    """What the policy saw at a timestep: (completion with masks, masked, current)."""
    state, masked, current = [], [], []
    for token, committed_at in zip(completion, step_map, strict=True):
        again = committed_at >= timestep
        state.append(mask_token_id if again else token)
        masked.append(again)
        current.append(committed_at == timestep)
    return state, masked, current


def timestep_weights(step_map: list[int], valid: list[bool], probs: list[float]) -> dict[int, float]:
    """-mean log probability of the valid tokens of every timestep that committed one."""
    surprises: dict[int, list[float]] = {}
    for timestep, good, prob in zip(step_map, valid, probs, strict=True):
        if good:
            surprises.setdefault(timestep, []).append(-math.log(prob))
    return {timestep: sum(values) / len(values) for timestep, values in sorted(surprises.items())}


def inclusion_probabilities(weights: dict[int, float], temperature: float, k: int) -> dict[int, float]:
    """Probability of each timestep to be among k draws without replacement, by walking every order."""
    mass = {timestep: math.exp(weight / temperature) for timestep, weight in weights.items()}
    included = dict.fromkeys(weights, 0.0)

    def walk(left: dict[int, float], chosen: list[int], probability: float) -> None:
        if len(chosen) == k or not left:
            for timestep in chosen:
                included[timestep] += probability
            return
        total = sum(left.values())
        for timestep, share in left.items():
            rest = {other: value for other, value in left.items() if other != timestep}
            walk(rest, [*chosen, timestep], probability * share / total)

    walk(mass, [], 1.0)
    return included


def score_state(
    policy: torch.nn.Module, prompt: list[int], state: list[int], completion: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability of every clean token, and the entropy there, from an unpadded pass over one row."""
    logits = policy.logits(torch.tensor([prompt + state]))[0, len(prompt) :].double()
    logps, entropies = [], []
    for position, token in enumerate(completion):
        legal = [v for v in range(logits.shape[1]) if v != policy.mask_token_id]
        total = sum(torch.exp(logits[position, v]) for v in legal)
        logps.append(logits[position, token] - torch.log(total))
        entropy = torch.zeros((), dtype=torch.float64)
        for v in legal:
            log_prob = logits[position, v] - torch.log(total)
            entropy = entropy - torch.exp(log_prob) * log_prob
        entropies.append(entropy)
    return logps, entropies


def kl_term(logp: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Estimate of the KL to the reference at one token."""
    d = reference - logp
    return {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - 1 - d}[kind]


def objective(
    logp: Tensor, old: Tensor | None, advantage: float, eps_low: float, eps_high: float
) -> tuple[Tensor, Tensor, bool]:
    """(loss, ratio, clipped) of one token: REINFORCE, or PPO's clip where there is an old log-probability."""
    if old is None:
        return -advantage * logp, torch.ones(()), False
    ratio = torch.exp(logp - old)
    if advantage > 0 and ratio > 1 + eps_high:
        return torch.tensor(-(1 + eps_high) * advantage), ratio, True
    if advantage < 0 and ratio < 1 - eps_low:
        return torch.tensor(-(1 - eps_low) * advantage), ratio, True
    return -ratio * advantage, ratio, False


def importance(proximal: Tensor, commit_logp: Tensor, current: bool, cap: float) -> float:
    """Truncated importance weight of one token: 1 unless it was committed at this very timestep."""
    return min(math.exp(proximal.item() - commit_logp.item()), cap) if current else 1.0


def is_kept(masked: bool, valid: bool, current: bool, feedback: float, tau: float) -> bool:
    """Whether a token belongs to the clipped clean state."""
    return masked and valid and (math.exp(feedback) >= tau or current)


def loss(  # noqa: C901 - plain loops
    *,
    logp: Tensor,
    masked: Tensor,
    current: Tensor,
    valid: Tensor,
    weight: Tensor,
    advantages: Tensor,
    tau: float | None,
    beta: float,
    kl: str,
    eps_low: float,
    eps_high: float,
    entropy_coeff: float,
    normalisation: str,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
    reference_entropy: Tensor | None = None,
    importance_cap: float | None = None,
    commit_logp: Tensor | None = None,
    token_weight: float = 1.0,
    num_timesteps: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of a plan and its parts, without commits; [K,N,C], valid [N,C], weight [K,N], the rest [N]."""
    num_slots, num_rows, length = logp.shape
    sums: dict[tuple[int, int], dict[str, Tensor]] = {}  # (slot, row) -> sums over its kept tokens
    counts: dict[tuple[int, int], int] = {}
    for k in range(num_slots):
        for n in range(num_rows):
            if weight[k, n] == 0:
                continue
            here = {
                name: torch.zeros(())
                for name in ("loss", "policy", "kl", "entropy", "ratio", "clip_fraction")
            }
            counts[k, n] = 0
            for c in range(length):
                feedback = (logp if old is None else old)[k, n, c].item()
                least = math.inf if tau is None else tau
                if not is_kept(
                    bool(masked[k, n, c]), bool(valid[n, c]), bool(current[k, n, c]), feedback, least
                ):
                    continue
                counts[k, n] += 1
                advantage = float(advantages[n])
                before = None if old is None else old[k, n, c]
                term, ratio, clipped = objective(logp[k, n, c], before, advantage, eps_low, eps_high)
                if importance_cap is not None:
                    proximal = logp if old is None else old
                    term = term * importance(
                        proximal[k, n, c], commit_logp[k, n, c], bool(current[k, n, c]), importance_cap
                    )
                term = token_weight * term
                here["policy"] = here["policy"] + term
                here["ratio"] = here["ratio"] + ratio
                here["clip_fraction"] = here["clip_fraction"] + float(clipped)
                here["loss"] = here["loss"] + term
                if reference is not None:
                    divergence = kl_term(logp[k, n, c], reference[k, n, c], kl)
                    here["kl"] = here["kl"] + divergence
                    here["loss"] = here["loss"] + beta * divergence
                if entropy is not None:
                    here["entropy"] = here["entropy"] + entropy[k, n, c]
                    apart = entropy[k, n, c]
                    if reference_entropy is not None:
                        apart = abs(reference_entropy[k, n, c] - entropy[k, n, c])
                    here["loss"] = here["loss"] + entropy_coeff * apart
            sums[k, n] = {name: weight[k, n] * value for name, value in here.items()}
    if normalisation == "trajectory":
        # A sum over the row's timesteps: their number times the mean over its states, whatever they hold
        assert num_timesteps is not None
        counts = dict.fromkeys(sums, 1)
        sums = {at: {name: num_timesteps[at[1]] * v for name, v in here.items()} for at, here in sums.items()}
    reduce = _per_token if normalisation == "token" else _per_row
    names = ("loss", "policy", "kl", "entropy", "ratio", "clip_fraction")
    return {name: reduce({at: here[name] for at, here in sums.items()}, counts, num_slots) for name in names}


def _per_token(
    sums: dict[tuple[int, int], Tensor], counts: dict[tuple[int, int], int], num_slots: int
) -> Tensor:
    """Sum over kept / number kept in every slot, then the mean over slots."""
    total = torch.zeros(())
    for k in range(num_slots):
        kept = sum(count for (slot, _), count in counts.items() if slot == k)
        for (slot, _), value in sums.items():
            if slot == k:
                total = total + value / max(kept, 1) / num_slots
    return total


def _per_row(sums: dict[tuple[int, int], Tensor], counts: dict[tuple[int, int], int], _: int) -> Tensor:
    """Mean over a noisy state's kept tokens, then over the row's states, then over the rows that have any."""
    rows = sorted({n for _, n in sums})
    total = torch.zeros(())
    for row in rows:
        states = [at for at in sums if at[1] == row]
        for at in states:
            total = total + sums[at] / max(counts[at], 1) / len(states) / len(rows)
    return total
