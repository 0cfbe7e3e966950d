"""Exactness: every trajectory of a tiny policy is walked through, with its probability and its graph.

The expected reward is a sum over them, and its gradient is compared with the expected estimate that rollouts,
sampler, noisy states and loss give. The walk knows nothing of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations, product

import pytest
import torch
from torch import Tensor

from drift.contract import CERTAIN, DRAWN, SUREST, Rollout
from drift.logprobs import token_logprobs
from drift.losses import LossConfig, rldf_loss
from drift.masking import masked_batch
from drift.models import DiffusionLM, Dream, DreamConfig, LLaDA, LLaDAConfig
from drift.rollout import DenoiseConfig, denoise
from drift.samplers import FullSampler

PAD, MASK, TOKENS = 0, 1, (2, 3)
PROMPT, LENGTH = [3, 2], 4
BASELINE = 0.4
SIZES = {"vocab_size": 4, "mask_token_id": MASK, "pad_token_id": PAD}


class OnlyTokens:
    """Padding has no probability: as no valid token it would be an action that the loss leaves out."""

    illegal_token_ids = [PAD, MASK]  # noqa: RUF012


class TinyLLaDA(OnlyTokens, LLaDA):
    pass


class TinyDream(OnlyTokens, Dream):
    pass


@pytest.fixture(params=["llada", "dream"])
def policy(request: pytest.FixtureRequest) -> DiffusionLM:
    torch.manual_seed(3)
    if request.param == "llada":
        sizes = {"d_model": 8, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 8}
        return TinyLLaDA(LLaDAConfig(**sizes, **SIZES, init_std=0.8)).eval()
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    return TinyDream(DreamConfig(**sizes, **SIZES, intermediate_size=8, initializer_range=0.8)).eval()


@dataclass
class Path:
    """One way to fill the completion, wholly or so far."""

    tokens: list[int] = field(default_factory=lambda: [MASK] * LENGTH)
    step_map: list[int] = field(default_factory=lambda: [0] * LENGTH)
    kinds: list[int] = field(default_factory=lambda: [CERTAIN] * LENGTH)
    probability: Tensor = field(default_factory=lambda: torch.ones(()))
    timestep: int = 0

    def then(self, committed: dict[int, int], probability: Tensor, kind: int = CERTAIN) -> Path:
        tokens, steps, kinds = list(self.tokens), list(self.step_map), list(self.kinds)
        for position, token in committed.items():
            tokens[position], steps[position], kinds[position] = token, self.timestep, kind
        return Path(tokens, steps, kinds, self.probability * probability, self.timestep + 1)


# What one pass can lead to, from the path so far, its masked positions of the block and all probabilities.
Rule = Callable[[Path, list[int], Tensor, DenoiseConfig], Iterator[Path]]


def drawn(path: Path, masked: list[int], probs: Tensor, config: DenoiseConfig) -> Iterator[Path]:
    """Every set of positions that draws can commit; the surest where none does."""
    assert config.threshold is not None
    chance = {i: torch.sigmoid((probs[i].max() - config.threshold) / config.width) for i in masked}
    surest = max(masked, key=lambda i: float(probs[i].detach().max()))
    for positions in chain.from_iterable(combinations(masked, n) for n in range(len(masked) + 1)):
        decided = torch.stack([chance[i] if i in positions else 1 - chance[i] for i in masked]).prod()
        kind = SUREST if positions in ((), (surest,)) else DRAWN
        yield from _filled(path, positions or (surest,), probs, decided, kind)


def static_top(path: Path, masked: list[int], probs: Tensor, config: DenoiseConfig) -> Iterator[Path]:
    """The two positions of the highest probabilities."""
    best = sorted(masked, key=lambda i: -float(probs[i].detach().max()))[:2]
    yield from _filled(path, best, probs, torch.ones(()), CERTAIN)


def threshold_candidate(
    path: Path, masked: list[int], probs: Tensor, config: DenoiseConfig
) -> Iterator[Path]:
    """Every candidate at every position; those whose own probability reaches the threshold commit."""
    assert config.threshold is not None
    for candidates in product(range(len(TOKENS)), repeat=len(masked)):
        scores = {i: probs[i, token] for i, token in zip(masked, candidates, strict=True)}
        chosen = [i for i in masked if float(scores[i].detach()) >= config.threshold]
        chosen = chosen or [max(masked, key=lambda i: float(scores[i].detach()))]
        committed = {i: TOKENS[token] for i, token in zip(masked, candidates, strict=True) if i in chosen}
        yield path.then(committed, torch.stack(list(scores.values())).prod())


def _filled(
    path: Path, positions: tuple[int, ...] | list[int], probs: Tensor, decided: Tensor, kind: int
) -> Iterator[Path]:
    for tokens in product(range(len(TOKENS)), repeat=len(positions)):
        chosen = dict(zip(positions, tokens, strict=True))
        probability = torch.stack([probs[i, token] for i, token in chosen.items()]).prod() * decided
        yield path.then({i: TOKENS[token] for i, token in chosen.items()}, probability, kind)


def walk(policy: DiffusionLM, config: DenoiseConfig, rule: Rule) -> list[Path]:
    """All trajectories, pass by pass."""
    paths, done = [Path()], []
    while paths:
        logits = policy.logits(torch.tensor([PROMPT + path.tokens for path in paths]))
        probs = logits[:, len(PROMPT) :, list(TOKENS)].softmax(dim=-1)
        following = []
        for path, of_path in zip(paths, probs, strict=True):
            first = path.tokens.index(MASK) // config.block_length * config.block_length
            block = range(first, first + config.block_length)
            masked = [i for i in block if path.tokens[i] == MASK]
            opening = config.block_opening == "first_token" and len(masked) == config.block_length
            if opening:
                following += _filled(path, [first], of_path, torch.ones(()), CERTAIN)
            else:
                following += rule(path, masked, of_path, config)
        paths = [path for path in following if MASK in path.tokens]
        done += [path for path in following if MASK not in path.tokens]
    return done


def reward(tokens: list[int]) -> float:
    """Any table would do: this one has no symmetry."""
    number = sum(2**place for place, token in enumerate(tokens) if token == TOKENS[1])
    return ((number * 7 + 3) % 16) / 16


def as_rollout(paths: list[Path], config: DenoiseConfig) -> Rollout:
    """The trajectories as a rollout; each counts as much as it is probable."""
    num = len(paths)
    steps = torch.tensor([path.step_map for path in paths])
    stochastic = config.rule == "stochastic"
    rule = torch.tensor([[config.threshold or 0.0, config.width]]).expand(num, 2)
    return Rollout(
        prompt_ids=torch.tensor([PROMPT]).expand(num, -1),
        prompt_mask=torch.ones(num, len(PROMPT), dtype=torch.bool),
        completion_ids=torch.tensor([path.tokens for path in paths]),
        completion_mask=torch.ones_like(steps, dtype=torch.bool),
        step_map=steps,
        commit_kind=torch.tensor([path.kinds for path in paths]) if stochastic else None,
        commit_rule=rule if stochastic else None,
        block_length=config.block_length,
        advantages=torch.stack(
            [(reward(path.tokens) - BASELINE) * path.probability.detach() for path in paths]
        ),
    )


def relative_error(
    policy: DiffusionLM, config: DenoiseConfig, rule: Rule, *, several: bool = False, **loss: float
) -> float:
    """How far the expected estimate is from the gradient of the expected reward."""
    paths = walk(policy, config, rule)
    assert float(sum(path.probability.detach() for path in paths)) == pytest.approx(1, abs=1e-5)
    expected = torch.stack([path.probability * reward(path.tokens) for path in paths]).sum()
    exact = _gradient(policy, expected)
    rollout = as_rollout(paths, config)
    noisy = masked_batch(rollout, FullSampler().plan(rollout), MASK, current_only=True)
    settings = LossConfig(tau=None, normalisation="trajectory", **loss)
    found = token_logprobs(policy, noisy, top=True)
    old = found.detach() if several else None
    estimate = -_gradient(policy, rldf_loss(found, noisy, settings, old=old, num_rows=1).loss)
    return float((estimate - exact).norm() / exact.norm())


def _gradient(policy: DiffusionLM, value: Tensor) -> Tensor:
    parts = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


STOCHASTIC = DenoiseConfig(block_length=2, threshold=0.7, width=0.1, temperature=1.0, commit="stochastic")
ONE_BLOCK = DenoiseConfig(block_length=4, threshold=0.7, width=0.1, temperature=1.0, commit="stochastic")
OPENED = DenoiseConfig(
    block_length=4,
    threshold=0.7,
    width=0.1,
    temperature=1.0,
    commit="stochastic",
    block_opening="first_token",
)
STATIC = DenoiseConfig(block_length=4, steps=2, temperature=1.0, commit="static", commit_by="top")
THRESHOLD = DenoiseConfig(block_length=4, threshold=0.7, temperature=1.0)


@pytest.mark.parametrize("config", [STOCHASTIC, ONE_BLOCK, OPENED], ids=["blocks", "one block", "opened"])
@pytest.mark.parametrize("several", [False, True], ids=["one update", "first of several"])
def test_draws_of_commits_give_the_gradient_of_the_expected_reward(policy, config, several):
    assert relative_error(policy, config, drawn, several=several) < 1e-5


def test_positions_by_rule_from_the_likeliest_token_give_it_too(policy):
    assert relative_error(policy, STATIC, static_top) < 1e-5


def test_tokens_alone_are_biased_where_draws_decide_over_commits(policy):
    assert relative_error(policy, STOCHASTIC, drawn, commit_weight=0.0) > 0.01


def test_tokens_alone_are_biased_where_the_candidates_decide_over_commits(policy):
    assert relative_error(policy, THRESHOLD, threshold_candidate) > 0.01


@pytest.mark.parametrize(
    ("config", "rule"),
    [(STOCHASTIC, drawn), (OPENED, drawn), (STATIC, static_top), (THRESHOLD, threshold_candidate)],
    ids=["blocks", "opened", "static", "threshold"],
)
def test_rollouts_are_drawn_from_the_process_that_is_walked(policy, config, rule):
    num = 4096
    prompt = torch.tensor([PROMPT]).expand(num, -1)
    rollout = denoise(
        policy, prompt, torch.ones_like(prompt, dtype=torch.bool), LENGTH, config, seeds=torch.arange(num)
    )
    assert (rollout.commit_kind is not None) == (rule is drawn)
    kinds = torch.full_like(rollout.step_map, CERTAIN) if rollout.commit_kind is None else rollout.commit_kind
    seen: dict[tuple[int, ...], int] = {}
    for row in torch.cat((rollout.completion_ids, rollout.step_map, kinds), dim=1).tolist():
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    with torch.no_grad():
        walked = walk(policy, config, rule)
    # The surest comes alone by its own draw and without one: two ways for the same trajectory.
    paths: dict[tuple[int, ...], float] = {}
    for path in walked:
        trajectory = (*path.tokens, *path.step_map, *path.kinds)
        paths[trajectory] = paths.get(trajectory, 0.0) + float(path.probability)
    assert seen.keys() <= paths.keys()
    # Pearson's statistic over trajectories that 5 or more rows are expected of: mean 1 a degree of freedom.
    often = [key for key, probability in paths.items() if probability * num >= 5]
    deviations = [(seen.get(key, 0) - paths[key] * num) ** 2 / (paths[key] * num) for key in often]
    # One that is nearly sure of its tokens has few trajectories, where no draws decide over commits.
    assert len(often) > (20 if rule is drawn else 2)
    assert sum(paths[key] for key in often) > 0.9
    assert sum(deviations) / len(often) < 1 + 4 * (2 / len(often)) ** 0.5
