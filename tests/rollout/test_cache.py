from collections.abc import Callable

import pytest
import torch

from drift.models import LLaDA
from drift.models.layers import positions_from_mask
from drift.rollout import PrefixCache


@pytest.mark.parametrize("first", [3, 8, 12])
def test_the_window_behind_the_cache_sees_what_a_full_pass_sees(
    policy: LLaDA, make_prompts: Callable, first: int
):
    """As long as the prefix hasn't changed, keys and values from the opening pass are the current ones."""
    ids, mask = make_prompts(14, 9)
    positions, cache = positions_from_mask(mask), PrefixCache(first)
    with torch.no_grad():
        full = policy(ids, mask)
        opening = policy(ids, mask, positions, cache)
        torch.testing.assert_close(opening, full)
        for _ in range(2):  # reading leaves the cache as it was
            window = policy(ids[:, first:], mask, positions[:, first:], cache)
            real = mask[:, first:]
            torch.testing.assert_close(window[real], full[:, first:][real], rtol=0, atol=1e-4)


def test_rows_leave_the_cache(policy: LLaDA, make_prompts: Callable):
    ids, _ = make_prompts(10, 10, 10)
    cache = PrefixCache(4)
    with torch.no_grad():
        full = policy(ids, None, None, cache)
        cache.keep(torch.tensor([True, False, True]))
        positions = torch.arange(4, 10).expand(2, -1)
        window = policy(ids[[0, 2], 4:], None, positions, cache)
    torch.testing.assert_close(window, full[[0, 2], 4:], rtol=0, atol=1e-4)


def test_the_cache_does_not_keep_the_whole_sequence_alive():
    cache = PrefixCache(2)
    keys = torch.zeros(1, 1, 100, 4)
    cache.extend(0, keys, keys)
    joined, _ = cache.extend(0, keys[:, :, :3], keys[:, :, :3])
    assert joined.shape[2] == 5
    assert cache._keys[0].untyped_storage().nbytes() == 5 * 4 * 4


def test_caches_of_two_cohorts_become_one(policy: LLaDA, make_prompts: Callable):
    ids, _ = make_prompts(10, 10, 10)
    one, other = PrefixCache(4), PrefixCache(4)
    with torch.no_grad():
        full = policy(ids, None, None, one)
        one.keep(torch.tensor([True, False, False]))
        policy(ids[1:], None, None, other)
        # A window has been fed behind one of them only.
        policy(ids[:1, 4:], None, torch.arange(4, 10)[None], one)
        one.append(other)
        window = policy(ids[:, 4:], None, torch.arange(4, 10).expand(3, -1), one)
    torch.testing.assert_close(window, full[:, 4:], rtol=0, atol=1e-4)
