"""The checks of what a policy does with a few probes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from drift.contract import Rollout
from drift.doctor.checks import Check
from drift.doctor.probes import Probe, batch_of, built_in_probes, random_probes
from drift.logprobs import token_logprobs
from drift.masking import masked_batch
from drift.models import DiffusionLM, Dream
from drift.models.head import in_chunks
from drift.rollout import DenoiseConfig, denoise
from drift.samplers import FullSampler

# An alternative counts as better where it gains this much a token, this surely (standard errors of the mean).
_MARGIN_NATS, _SIGMAS, _LEAST_TOKENS = 0.5, 4.0, 20
# Mean difference of log-probabilities that rounding explains, in units of the spread of the logits, with
# which it grows. In bfloat16 rounding took up to 0.03 of it, an attention that reads padding 0.3 and more.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
_LONGEST, _PROMPT_LENGTH, _COMPLETION_LENGTH = 256, 64, 16
_OTHER_CANDIDATES = 8
_MOVES = (0, -1, 1)  # rows of the head that a token may be read off: its own, those before and behind


@torch.no_grad()
def examine(
    policy: DiffusionLM, tokenizer: PreTrainedTokenizerFast | None, probes: Sequence[Probe]
) -> list[Check]:
    """The checks that need the policy: a few short forward passes.

    Args:
        policy: in evaluation mode, where it is to be used.
        tokenizer: the policy's; None leaves out what takes one.
        probes: texts of the task; built-in ones are added.
    """
    checks = [_finite(policy)]
    if checks[0].status == "failed":
        return checks  # NaN would fail every other one
    texts = [Probe(ids=p.ids[:_LONGEST], start=p.start) for p in probes]
    texts = [probe for probe in texts if len(probe.ids) > probe.start + 2]
    known = [] if tokenizer is None else built_in_probes(tokenizer)
    if tokenizer is not None:
        checks += _likelihoods(policy, tokenizer, [group for group in (texts, known) if group])
    illegal = set(policy.illegal_token_ids)
    texts = texts + known or random_probes([i for i in range(policy.head.out_features) if i not in illegal])
    return [*checks, _padding(policy, texts), *_rollout(policy, texts)]


def _finite(policy: DiffusionLM) -> Check:
    bad = [name for name, value in policy.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        found = f"{len(bad)} tensors hold NaN or infinity, such as {bad[0]}"
        fix = "the checkpoint is damaged or its training diverged: copy it again, or take an earlier one"
        return Check(name="weights", status="failed", found=found, fix=fix)
    number = sum(p.numel() for p in policy.parameters())
    return Check(name="weights", status="ok", found=f"{number:,} parameters, all finite")


def _likelihoods(
    policy: DiffusionLM, tokenizer: PreTrainedTokenizerFast, groups: list[list[Probe]]
) -> Iterator[Check]:
    """Does the head answer for its own position, and is the mask token the one that it was trained with?"""
    batch, rows, chance = _best_known(policy, groups)
    aligned = rows.pop(0)
    gains = {move: _gain(other, aligned, chance) for move, other in rows.items()}
    better = max((move for move in gains if gains[move]), key=lambda move: gains[move], default=None)
    losses = [_gain(aligned, other, chance) for other in rows.values()]
    said = f"masked tokens of known texts: {aligned.mean().item():.2f} nats each"
    if better is not None:
        yield _shifted(policy, better, gains[better])
    elif all(losses):
        yield Check(name="shift", status="ok", found=f"{said}, {min(losses):.1f} better than the rows beside")
    else:
        found = f"{said}, as a guess would be (a fresh or very small policy?)"
        yield Check(name="shift", status="unsure", found=found)
    yield _mask_id(policy, tokenizer, batch, aligned, chance)


def _best_known(
    policy: DiffusionLM, groups: list[list[Probe]]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[int, Tensor], float]:
    """The batch of those probes that the policy knows best, their scores by row of the head, and `chance`.

    The last is what the best guess without context would score: it says how much there is to know.
    """
    found = []
    for texts in groups:
        ids, mask, asked = (t.to(policy.device) for t in batch_of(texts, policy.pad_token_id))
        # The neighbours of the asked positions must exist, for what their rows of the head say.
        asked[:, -1] = False
        scores = _scores(policy, ids, mask, asked, policy.mask_token_id, _MOVES)
        rows = dict(zip(_MOVES, scores, strict=True))
        share = ids[asked].unique(return_counts=True)[1] / max(asked.sum().item(), 1)
        chance = (share * share.log()).sum().item()
        enough = asked.sum().item() >= _LEAST_TOKENS
        best = max(row.mean().item() for row in rows.values()) - chance if enough else -math.inf
        found.append((best, (ids, mask, asked), rows, chance))
    return max(found, key=lambda entry: entry[0])[1:]


def _shifted(policy: DiffusionLM, move: int, gain: float) -> Check:
    name = policy.config.model_type
    if isinstance(policy, Dream) and move == 1:
        what = "the head looks unshifted: this is a LLaDA-type checkpoint"
    elif not isinstance(policy, Dream) and move == -1:
        what = "the head looks shifted by one: this is a Dream-type checkpoint"
    else:
        what = "the head looks shifted the wrong way: the checkpoint belongs to another kind of model"
    found = f"the row {'before' if move < 0 else 'behind'} predicts masked tokens {gain:.1f} nats better"
    fix = f"{what}, model_type says {name}; use the config.json that came with the weights"
    return Check(name="shift", status="failed", found=found, fix=fix)


def _mask_id(
    policy: DiffusionLM,
    tokenizer: PreTrainedTokenizerFast,
    batch: tuple[Tensor, Tensor, Tensor],
    aligned: Tensor,
    chance: float,
) -> Check:
    ours = policy.mask_token_id
    special = sorted(set(tokenizer.get_added_vocab().values()) - {ours})
    named = [i for i in special if "mask" in str(tokenizer.convert_ids_to_tokens(i)).lower()]
    others = [i for i in special if i not in named and i != policy.pad_token_id][:_OTHER_CANDIDATES]
    # Ordinary tokens, evenly over the vocabulary: none of them is as good as the mask that was trained.
    words = [i for i in range(5, len(tokenizer), max(len(tokenizer) // _OTHER_CANDIDATES, 1)) if i != ours]
    candidates = [i for i in {*named, *others, *words} if i < policy.head.weight.shape[0]]
    gains = {i: _gain(_scores(policy, *batch, i)[0], aligned, chance) for i in candidates}
    best = max((i for i in gains if gains[i]), key=lambda i: gains[i], default=None)
    if best is not None:
        name, gain = tokenizer.convert_ids_to_tokens(best), gains[best]
        found = f"masking with {best} {name!r} predicts {gain:.1f} nats better than with {ours}"
        fix = f"config.json has mask_token_id: {ours}; set it to {best}"
        return Check(name="mask id", status="failed", found=found, fix=fix)
    name = tokenizer.convert_ids_to_tokens(ours)
    said = f"{ours} {name!r}: none of {len(candidates)} other tokens predicts better"
    return Check(name="mask id", status="ok" if aligned.mean().item() > chance else "unsure", found=said)


def _scores(
    policy: DiffusionLM,
    ids: Tensor,
    mask: Tensor,
    asked: Tensor,
    mask_token_id: int,
    moves: Sequence[int] = (0,),
) -> list[Tensor]:
    """[n] log-probabilities of the asked tokens, read off the rows that many places away; nats."""
    hidden = policy(ids.masked_fill(asked, mask_token_id), mask)
    row, position = asked.nonzero(as_tuple=True)

    def read(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return (logits.log_softmax(dim=-1).gather(-1, target[:, None])[:, 0],)

    return [
        policy.head(hidden[row, position + move], in_chunks(read, ids[row, position], size=256))[0]
        for move in moves
    ]


def _gain(one: Tensor, other: Tensor, chance: float) -> float:
    """By how much some log-probabilities are above others, nats; 0 unless surely, clearly and knowing.

    The last means better than any guess without context: random weights favour one reading over another, too,
    and at every token alike, but they know nothing.
    """
    difference = (one - other).double()
    if len(difference) < _LEAST_TOKENS or one.mean().item() <= chance:
        return 0.0
    mean, error = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
    return mean if mean > max(_MARGIN_NATS, _SIGMAS * error) else 0.0


def _padding(policy: DiffusionLM, texts: list[Probe]) -> Check:
    """Rows alone against the same rows left-padded beside longer ones."""
    texts = [Probe(ids=p.ids[: 8 + 5 * n], start=0) for n, p in enumerate(texts[:4])]
    ids, mask, asked = (t.to(policy.device) for t in batch_of(texts, policy.pad_token_id))
    together = _scores(policy, ids, mask, asked, policy.mask_token_id)[0]
    alone = []
    for row in range(len(texts)):
        real = mask[row]
        one, ones, where = (t[row, real][None] for t in (ids, mask, asked))
        alone.append(_scores(policy, one, ones, where, policy.mask_token_id)[0])
    off = (together - torch.cat(alone)).abs().mean().item()
    limit = _tolerance(policy, ids, mask, asked)
    found = f"padded rows differ from the same rows alone by {off:.1e} nats a token"
    if math.isnan(off) or off > limit:
        fix = "the attention reads padding: its mask or its position ids do not reach the policy's blocks"
        return Check(name="padding", status="failed", found=found, fix=fix)
    return Check(name="padding", status="ok", found=found)


def _tolerance(policy: DiffusionLM, ids: Tensor, mask: Tensor, asked: Tensor) -> float:
    """The largest mean difference of log-probabilities that rounding explains, nats."""
    dtype = policy.head.weight.dtype
    if torch.is_autocast_enabled(policy.device.type):
        dtype = torch.get_autocast_dtype(policy.device.type)

    def spread(logits: Tensor) -> tuple[Tensor, ...]:
        legal = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        legal[policy.illegal_token_ids] = False
        return (logits[:, legal].std(dim=-1),)

    hidden = policy(ids.masked_fill(asked, policy.mask_token_id), mask)[asked]
    return _TOLERANCE[dtype] * max(policy.head(hidden, in_chunks(spread, size=256))[0].mean().item(), 1e-2)


def _rollout(policy: DiffusionLM, texts: list[Probe]) -> Iterator[Check]:
    """What a short uncached rollout emits, and whether scoring it again gives the recorded probabilities."""
    prompts = [Probe(ids=p.ids[-_PROMPT_LENGTH:]) for p in texts[:2]]
    ids, mask, asked = (t.to(policy.device) for t in batch_of(prompts, policy.pad_token_id))
    opening = "first_token" if isinstance(policy, Dream) else "confidence"
    config = DenoiseConfig(
        block_length=_COMPLETION_LENGTH, threshold=None, steps=4, temperature=1.0, block_opening=opening
    )
    rollout = denoise(policy, ids, mask, _COMPLETION_LENGTH, config, torch.Generator().manual_seed(0))
    illegal = torch.tensor(policy.illegal_token_ids, device=ids.device)
    emitted = torch.isin(rollout.completion_ids, illegal).sum().item()
    yield Check(
        name="legal tokens",
        status="failed" if emitted else "ok",
        found=f"{emitted} of {rollout.completion_ids.numel()} drawn tokens are the mask or stand for nothing",
        fix="illegal_token_ids of the policy's class does not reach its decoding" if emitted else "",
    )
    off, num = _rescored(policy, rollout)
    if num == 0:
        yield Check(name="re-scoring", status="unsure", found="the rollout held nothing but padding")
        return
    found = f"{num} rolled-out tokens, scored again: {off:.1e} nats apart on average"
    if math.isnan(off) or off > _tolerance(policy, ids, mask, asked):
        fix = "rollout and update do not see the same states, every gradient would be wrong: report it"
        yield Check(name="re-scoring", status="failed", found=found, fix=fix)
    else:
        yield Check(name="re-scoring", status="ok", found=found)


def _rescored(policy: DiffusionLM, rollout: Rollout) -> tuple[float, int]:
    """Mean difference of recorded and re-scored log-probabilities, nats, and of how many tokens."""
    assert rollout.token_probs is not None
    batch = masked_batch(rollout, FullSampler().plan(rollout), policy.mask_token_id)
    if len(batch) == 0:
        return 0.0, 0
    again = token_logprobs(policy, batch).logp[batch.current]
    recorded = rollout.token_probs.log()[batch.row][batch.current]
    return (again - recorded).abs().mean().item(), int(batch.current.sum())
