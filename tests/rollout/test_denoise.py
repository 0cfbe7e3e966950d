from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from drift.contract import ConfigError, Rollout
from drift.logprobs import token_logprobs
from drift.masking import masked_batch
from drift.mismatch import measure_mismatch
from drift.models import LLaDA
from drift.rollout import DenoiseConfig, PrefixCache, denoise
from drift.samplers import FullSampler

LENGTHS = (9, 5, 7, 2, 9, 6)
BLOCK, LENGTH = 4, 16

# Every score, schedule, filter and kind of cache, at temperature 0 and above.
CONFIGS = {
    "greedy": {"threshold": 0.6},
    "greedy margin, cache": {"threshold": 0.4, "score": "margin", "use_cache": True, "horizon": 3},
    "greedy entropy": {"threshold": -0.8, "score": "neg_entropy"},
    "greedy random, static": {"threshold": None, "steps": 9, "score": "random", "use_cache": True},
    "greedy opening": {"threshold": 0.5, "block_opening": "first_token", "use_cache": True, "horizon": 0},
    "sampled": {"threshold": 0.6, "temperature": 1.0},
    "sampled top-p, cache": {"threshold": 0.6, "temperature": 1.0, "top_p": 0.9, "use_cache": True},
    "sampled top-k margin": {"threshold": 0.4, "temperature": 1.0, "top_k": 5, "score": "margin"},
    "sampled entropy, static": {"threshold": None, "steps": 6, "temperature": 1.0, "score": "neg_entropy"},
    "sampled random": {"threshold": 0.7, "temperature": 0.7, "top_p": 0.95, "top_k": 9, "score": "random"},
}
WITHOUT_CACHE = {name: settings for name, settings in CONFIGS.items() if not settings.get("use_cache")}
every_config = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
every_config_without_cache = pytest.mark.parametrize(
    "settings", WITHOUT_CACHE.values(), ids=WITHOUT_CACHE.keys()
)


@pytest.fixture(scope="module")
def prompts(make_prompts: Callable) -> tuple[Tensor, Tensor]:
    return make_prompts(*LENGTHS)


def run(policy: LLaDA, ids: Tensor, mask: Tensor, settings: dict, seeds: Tensor | None = None) -> Rollout:
    config = DenoiseConfig(block_length=BLOCK, **settings)
    return denoise(
        policy, ids, mask, LENGTH, config, seeds=torch.arange(len(ids)) if seeds is None else seeds
    )


def assert_same(one: Rollout, other: Rollout) -> None:
    for name in ("completion_ids", "completion_mask", "step_map", "num_timesteps", "seeds"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    # The order of float32 sums changes with the batch, nothing else does.
    torch.testing.assert_close(one.token_probs, other.token_probs, rtol=0, atol=1e-5)


@contextmanager
def watched(policy: nn.Module) -> Iterator[list[Tensor]]:
    """The input ids of every forward pass."""
    seen: list[Tensor] = []
    hook = policy.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        yield seen
    finally:
        hook.remove()


def test_these_rollouts_have_what_the_tests_below_need(ending_policy: LLaDA, prompts: tuple[Tensor, Tensor]):
    for settings in CONFIGS.values():
        rollout = run(ending_policy, *prompts, settings)
        undecoded = rollout.step_map == rollout.num_timesteps[:, None]
        assert undecoded.any(), "no row ends early"
        assert not undecoded.any(dim=1).all(), "every row ends early"
        assert (~rollout.completion_mask & ~undecoded).any(), "no padding was decoded"


@every_config
def test_a_row_alone_is_the_row_in_any_batch(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    ids, mask = prompts
    together = run(ending_policy, ids, mask, settings)
    for row, length in enumerate(LENGTHS):
        seed = torch.tensor([row])
        alone = run(
            ending_policy, ids[row : row + 1, -length:], mask[row : row + 1, -length:], settings, seed
        )
        assert_same(alone, together.select(seed))
    some = torch.tensor([4, 1, 3])
    assert_same(run(ending_policy, ids[some], mask[some], settings, some), together.select(some))


@every_config
def test_more_left_padding_changes_nothing(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    ids, mask = prompts
    padding = torch.randint(0, 48, (len(ids), 5), generator=torch.Generator().manual_seed(7))
    padded = run(
        ending_policy,
        torch.cat((padding, ids), dim=1),
        torch.cat((torch.zeros_like(padding, dtype=torch.bool), mask), dim=1),
        settings,
    )
    assert_same(padded, run(ending_policy, ids, mask, settings))


@every_config
def test_the_timesteps_of_a_row_have_no_gaps(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    rollout = run(ending_policy, *prompts, settings)
    for row in range(len(rollout.step_map)):
        num = int(rollout.num_timesteps[row])
        assert set(rollout.step_map[row].tolist()) - {num} == set(range(num))
        assert (rollout.token_probs[row][rollout.step_map[row] < num] > 0).all()
    # Blocks from left to right: a later block is committed after an earlier one.
    blocks = rollout.step_map.unflatten(1, (-1, BLOCK))
    decoded = blocks[:, 1:] < rollout.num_timesteps[:, None, None]
    later = (blocks[:, 1:].amin(dim=2) > blocks[:, :-1].amax(dim=2))[:, :, None]
    assert (later | ~decoded).all()


@every_config
def test_a_row_that_ended_is_padding_and_costs_nothing(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    ids, mask = prompts
    with watched(ending_policy) as passes:
        rollout = run(ending_policy, ids, mask, settings)
    assert rollout.num_forwards == len(passes)
    # Every row takes part in the passes that are its own timesteps, and in no other.
    assert sum(len(rows) for rows in passes) == rollout.num_timesteps.sum()
    undecoded = rollout.step_map == rollout.num_timesteps[:, None]
    assert (rollout.completion_ids[undecoded] == 0).all()
    assert not rollout.completion_mask[undecoded].any()
    assert (rollout.token_probs[undecoded] == 0).all()
    blocks = (rollout.completion_ids == 0).unflatten(1, (-1, BLOCK)).all(dim=2)
    gone = undecoded.unflatten(1, (-1, BLOCK))
    assert torch.equal(gone.any(dim=2), gone.all(dim=2))
    # Undecoded are exactly the blocks after the first one that is all padding.
    assert torch.equal(gone.all(dim=2)[:, 1:], blocks.cumsum(dim=1)[:, :-1] > 0)


@every_config
def test_without_stopping_everything_before_the_end_is_the_same(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    stopped = run(ending_policy, *prompts, settings)
    full = run(ending_policy, *prompts, settings | {"stop_at_padding": False})
    assert (full.step_map < full.num_timesteps[:, None]).all()
    decoded = stopped.step_map < stopped.num_timesteps[:, None]
    assert torch.equal(full.completion_ids[decoded], stopped.completion_ids[decoded])
    assert torch.equal(full.step_map[decoded], stopped.step_map[decoded])
    torch.testing.assert_close(full.token_probs[decoded], stopped.token_probs[decoded], rtol=0, atol=1e-5)
    assert full.num_timesteps.sum() > stopped.num_timesteps.sum()


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("name", ["greedy margin, cache", "sampled random"])
def test_the_heads_chunks_change_nothing(
    ending_policy: LLaDA,
    prompts: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    chunk: int,
):
    whole = run(ending_policy, *prompts, CONFIGS[name])
    monkeypatch.setitem(denoise.__wrapped__.__globals__, "CHUNK_SIZE", chunk)
    assert_same(run(ending_policy, *prompts, CONFIGS[name]), whole)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}])
def test_the_mask_token_is_never_emitted(
    make_policy: Callable[..., LLaDA], prompts: tuple[Tensor, Tensor], settings: dict
):
    biased = make_policy(favour={1: 400.0})
    ids, mask = prompts
    with torch.no_grad():
        probs = biased.logits(ids, mask)[mask].softmax(dim=-1)
    assert (probs.argmax(dim=-1) == 1).all(), "the head isn't biased to the mask token"
    rollout = run(biased, ids, mask, {"threshold": 0.6} | settings)
    assert not (rollout.completion_ids == 1).any()
    # Probabilities are those among the legal tokens: without that, none would reach a thousandth.
    assert rollout.token_probs.mean() > 0.1


@pytest.mark.parametrize("steps", [4, 9, 13, 16])
@pytest.mark.parametrize("opening", ["confidence", "first_token"])
def test_a_static_schedule_commits_its_quotas(
    policy: LLaDA, prompts: tuple[Tensor, Tensor], steps: int, opening: str
):
    if opening == "first_token" and steps == 4:
        steps = 8
    settings = {"threshold": None, "steps": steps, "block_opening": opening, "stop_at_padding": False}
    rollout = run(policy, *prompts, settings)
    quotas = DenoiseConfig(block_length=BLOCK, **settings).quotas(LENGTH)
    wanted = [quota for block in quotas for quota in block]
    for row in rollout.step_map:
        assert row.bincount().tolist() == wanted
    if opening == "first_token":
        firsts = rollout.step_map.unflatten(1, (-1, BLOCK))
        assert (firsts[:, :, :1] < firsts[:, :, 1:]).all()


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_a_dynamic_schedule_commits_all_that_reach_it_or_the_best(
    policy: LLaDA, prompts: tuple[Tensor, Tensor], threshold: float
):
    """Score and choice at every timestep, recomputed one row and one position at a time."""
    ids, _ = prompts
    fallbacks = several = 0
    for row, length in enumerate(LENGTHS):
        prompt = ids[row : row + 1, -length:]
        rollout = run(policy, prompt, torch.ones_like(prompt, dtype=torch.bool), {"threshold": threshold})
        step_map, tokens = rollout.step_map[0], rollout.completion_ids[0]
        for timestep in range(int(rollout.num_timesteps[0])):
            state = tokens.masked_fill(step_map >= timestep, policy.mask_token_id)
            with torch.no_grad():
                logits = policy.logits(torch.cat((prompt[0], state))[None])[0, length:]
            logits[:, policy.mask_token_id] = -torch.inf
            best, token = logits.softmax(dim=-1).max(dim=-1)
            block = int((step_map == timestep).nonzero()[0, 0]) // BLOCK * BLOCK
            open_positions = [i for i in range(block, block + BLOCK) if step_map[i] >= timestep]
            wanted = [i for i in open_positions if best[i] >= threshold]
            fallbacks += not wanted
            several += len(wanted) > 1
            wanted = wanted or [max(open_positions, key=lambda i: best[i].item())]
            assert (step_map == timestep).nonzero()[:, 0].tolist() == wanted
            assert tokens[wanted].tolist() == token[wanted].tolist()
    assert fallbacks
    assert several or threshold == 0.9


@every_config_without_cache
def test_training_scores_the_tokens_as_the_rollout_did(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    """Without cache the replay of a timestep gives its tokens the probabilities that were recorded."""
    rollout = run(ending_policy, *prompts, settings)
    batch = masked_batch(rollout, FullSampler().plan(rollout), ending_policy.mask_token_id)
    with torch.no_grad():
        logp = token_logprobs(ending_policy, batch).logp
    recorded = rollout.token_probs[batch.row]
    torch.testing.assert_close(logp[batch.current], recorded[batch.current].log(), rtol=0, atol=2e-5)
    assert batch.current.sum() == rollout.completion_mask.sum()  # every valid token, once


@every_config
def test_the_probabilities_of_the_rollout_are_kept_twice(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    """What decides over timesteps is refreshed by replacing it, which must leave the other as it is."""
    rollout = run(ending_policy, *prompts, settings)
    assert torch.equal(rollout.commit_probs, rollout.token_probs)
    assert (rollout.commit_probs[rollout.completion_mask] > 0).all()


def test_a_cached_rollout_is_further_from_the_update_than_float32_rounds(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor]
):
    found = {}
    for use_cache in (False, True):
        settings = {"threshold": 0.6, "temperature": 1.0, "use_cache": use_cache}
        rollout = run(ending_policy, *prompts, settings)
        batch = masked_batch(rollout, FullSampler().plan(rollout), ending_policy.mask_token_id)
        with torch.no_grad():
            found[use_cache] = measure_mismatch(token_logprobs(ending_policy, batch).logp, batch)
    assert found[False].kl / found[False].num_tokens < 1e-5
    assert found[False].max_ratio < 1 + 1e-4
    assert found[True].kl / found[True].num_tokens > 1e-3
    assert found[True].max_ratio > 1.1


@every_config_without_cache
def test_noisy_states_are_exactly_what_the_policy_saw(
    ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], settings: dict
):
    ids, mask = prompts
    rollout = run(ending_policy, ids, mask, settings)
    batch = masked_batch(rollout, FullSampler().plan(rollout), ending_policy.mask_token_id)
    for row, length in enumerate(LENGTHS):
        with watched(ending_policy) as passes:
            run(
                ending_policy,
                ids[row : row + 1, -length:],
                mask[row : row + 1, -length:],
                settings,
                torch.tensor([row]),
            )
        assert len(passes) == rollout.num_timesteps[row]
        mine = batch.select((batch.row == row).nonzero()[:, 0])
        timesteps = [int(rollout.step_map[row][now].unique()) for now in mine.current]
        learnt = rollout.step_map[row][rollout.completion_mask[row]].unique().tolist()
        assert timesteps == learnt
        for state, timestep in zip(mine.input_ids, timesteps, strict=True):
            assert torch.equal(state[-length - LENGTH :], passes[timestep][0])


@pytest.mark.parametrize(
    ("horizon", "widths"), [(None, (16, 12, 8, 4)), (3, (7, 7, 7, 4)), (0, (4, 4, 4, 4))]
)
def test_passes_behind_the_cache_see_block_and_horizon(
    policy: LLaDA, prompts: tuple[Tensor, Tensor], horizon: int | None, widths: tuple[int, ...]
):
    settings = {
        "threshold": None,
        "steps": 8,
        "use_cache": True,
        "horizon": horizon,
        "stop_at_padding": False,
    }
    with watched(policy) as passes:
        run(policy, *prompts, settings)
    # Two passes a block: the opening over prompt (9) and completion (16), the other over the window.
    assert [rows.shape[1] for rows in passes] == [width for window in widths for width in (25, window)]


def test_draws_come_from_seeds_or_from_the_generator(policy: LLaDA, prompts: tuple[Tensor, Tensor]):
    config = DenoiseConfig(block_length=BLOCK, threshold=0.6, temperature=1.0)

    def with_generator(seed: int) -> Rollout:
        return denoise(policy, *prompts, LENGTH, config, torch.Generator().manual_seed(seed))

    first = with_generator(0)
    assert_same(with_generator(0), first)
    assert not torch.equal(with_generator(1).completion_ids, first.completion_ids)
    assert_same(run(policy, *prompts, {"threshold": 0.6, "temperature": 1.0}, first.seeds), first)


def test_global_random_state_and_mode_are_left_alone(
    make_policy: Callable[..., LLaDA], prompts: tuple[Tensor, Tensor]
):
    policy = make_policy().train()
    before = torch.get_rng_state()
    rollout = run(policy, *prompts, {"temperature": 1.0})
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training
    assert not rollout.token_probs.requires_grad


def test_samples_follow_the_policy(make_policy: Callable[..., LLaDA]):
    """One position, decoded 8000 times with other seeds: token frequencies are the policy's probabilities."""
    policy, num = make_policy(init_std=0.25), 8000
    prompt = torch.tensor([[5, 6, 7]]).expand(num, -1)
    config = DenoiseConfig(block_length=1, temperature=1.0)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    rollout = denoise(policy, prompt, mask, 1, config, seeds=torch.arange(num))
    with torch.no_grad():
        logits = policy.logits(torch.tensor([[5, 6, 7, 1]]))[0, 3]
    logits[1] = -torch.inf
    expected = logits.softmax(dim=-1).double() * num
    counts = rollout.completion_ids[:, 0].bincount(minlength=48).double()
    common = expected >= 5
    statistic = ((counts - expected).square() / expected)[common].sum()
    degrees = int(common.sum()) - 1
    assert degrees >= 10
    # Mean d, standard deviation sqrt(2 d): five of them.
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_progress_is_reported_block_by_block(policy: LLaDA, prompts: tuple[Tensor, Tensor]):
    seen: list[tuple[int, int]] = []
    config = DenoiseConfig(block_length=BLOCK, threshold=None, steps=4, stop_at_padding=False)
    denoise(policy, *prompts, LENGTH, config, on_progress=lambda *at: seen.append(at))
    assert seen == [(4, 16), (8, 16), (12, 16), (16, 16)]


def test_a_completion_that_is_no_whole_number_of_blocks_is_refused(
    policy: LLaDA, prompts: tuple[Tensor, Tensor]
):
    with pytest.raises(ConfigError, match="completion_length is 18, block_length is 4"):
        denoise(policy, *prompts, 18, DenoiseConfig(block_length=4))


def test_the_prompt_comes_back_as_it_was(policy: LLaDA, prompts: tuple[Tensor, Tensor]):
    ids, mask = prompts
    before = ids.clone()
    rollout = run(policy, ids, mask, {})
    assert torch.equal(rollout.prompt_ids, before)
    assert torch.equal(ids, before)
    assert torch.equal(rollout.prompt_mask, mask)


def many_prompts(make_prompts: Callable) -> tuple[Tensor, Tensor]:
    """Twelve rows of very different lengths: not all of them share their passes."""
    return make_prompts(90, 5, 7, 60, 9, 6, 88, 30, 31, 2, 75, 9)


@every_config
@pytest.mark.parametrize("changes", [{}, {"interleave": 2}, {"interleave": 3}], ids=str)
def test_a_queue_gives_what_all_rows_at_once_give(
    ending_policy: LLaDA, make_prompts: Callable, settings: dict, changes: dict
):
    ids, mask = many_prompts(make_prompts)
    seeds = torch.arange(len(ids))
    config = DenoiseConfig(block_length=BLOCK, **settings, **changes)
    with watched(ending_policy) as passes:
        queued = denoise(ending_policy, ids, mask, LENGTH, config, seeds=seeds, batch_size=5)
    assert max(map(len, passes)) <= 5
    # No pass computes a row that has nothing to decode, even where the host reads behind.
    assert sum(map(len, passes)) == queued.num_timesteps.sum()
    for row in range(len(ids)):
        one = slice(row, row + 1)
        length = int(mask[row].sum())
        alone = run(ending_policy, ids[one, -length:], mask[one, -length:], settings, seeds[one])
        assert_same(alone, queued.select(seeds[one]))


def test_one_slow_row_does_not_hold_the_others(policy: LLaDA, make_prompts: Callable):
    """The passes of a queue are fuller than those of batches that wait for their slowest row."""
    ids, mask = make_prompts(*[9] * 24)
    config = DenoiseConfig(block_length=BLOCK, threshold=0.6)
    queued = denoise(policy, ids, mask, LENGTH, config, seeds=torch.arange(24), batch_size=6)
    batches = [
        denoise(policy, i, m, LENGTH, config, seeds=torch.arange(6))
        for i, m in zip(ids.split(6), mask.split(6), strict=True)
    ]
    assert len(queued.num_timesteps.unique()) > 1
    assert queued.num_forwards < sum(rollout.num_forwards for rollout in batches)


def test_short_prompts_cost_little_padding(policy: LLaDA, make_prompts: Callable):
    ids, mask = make_prompts(*[8] * 16, *[200] * 16)
    settings = {"threshold": None, "steps": 4, "stop_at_padding": False}
    with watched(policy) as passes:
        run(policy, ids, mask, settings)
    real = 4 * (16 * (8 + LENGTH) + 16 * (200 + LENGTH))
    assert real <= sum(rows.numel() for rows in passes) <= 1.125 * real


@pytest.mark.parametrize("horizon", [0, 3])
def test_a_dual_cache_feeds_the_window_and_sees_everything(
    policy: LLaDA, prompts: tuple[Tensor, Tensor], horizon: int
):
    """One block that is opened and decoded by hand."""
    ids, mask = prompts[0][:1], prompts[1][:1]
    assert mask.all()
    settings = {"threshold": None, "steps": 8, "stop_at_padding": False, "use_cache": True}
    settings |= {"horizon": horizon, "dual_cache": True}
    with watched(policy) as passes:
        rollout = run(policy, ids, mask, settings)
    assert [rows.shape[1] for rows in passes[:2]] == [25, BLOCK + horizon]
    whole = passes[0]
    cache = PrefixCache(9, dual=True)
    with torch.no_grad():
        policy(whole, None, None, cache)
        positions = torch.arange(9, 9 + BLOCK + horizon)[None]
        logits = policy.head(policy(passes[1], None, positions, cache))[0, :BLOCK]
        narrow = PrefixCache(9)
        policy(whole, None, None, narrow)
        unseen = policy.head(policy(passes[1], None, positions, narrow))[0, :BLOCK]
    second = rollout.step_map[0, :BLOCK] == 1
    expected = policy.forbid_illegal(logits)[second].softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(rollout.token_probs[0, :BLOCK][second], expected, rtol=0, atol=1e-5)
    # What is after the window matters.
    assert (logits - unseen).abs().max() > 1e-3


def test_a_dual_cache_needs_a_horizon():
    with pytest.raises(ConfigError, match=r"dual_cache is True: .* horizon to a number"):
        DenoiseConfig(use_cache=True, dual_cache=True)
    with pytest.raises(ConfigError, match="interleave is 0"):
        DenoiseConfig(interleave=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy margin, cache", "sampled"])
def test_compiled_blocks_give_the_same(ending_policy: LLaDA, prompts: tuple[Tensor, Tensor], name: str):
    torch._dynamo.reset()
    expected = run(ending_policy, *prompts, CONFIGS[name])
    compiled = run(ending_policy, *prompts, CONFIGS[name] | {"compile": True})
    assert_same(compiled, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(run(ending_policy, *prompts, CONFIGS[name] | {"compile": True}), expected)
    assert not any(block.compiled for block in ending_policy.blocks)
