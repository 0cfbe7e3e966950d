import pytest
import torch

from drift.callbacks import RolloutCallback
from drift.data import PromptDataModule
from drift.randomness import draw_keys, fold, run_seed, uniform
from drift.sft import SFTModule
from drift.tasks import SudokuTask

NUM = 100_000


def test_known_answers():
    """A change of these numbers changes every sample of every run."""
    keys = torch.tensor([0, 1, -1, 2**62])
    # SplitMix64's published first outputs for seed 0: E220A8397B1DCDAF, 6E789E6AA1B965F4, 06C45D188009454F.
    states = torch.tensor([0, 0x9E3779B97F4A7C15 - 2**64, (2 * 0x9E3779B97F4A7C15) % 2**64])
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniform(states).tolist() == pytest.approx([x / 2**64 for x in published], abs=2**-53)
    assert fold(keys, 7).tolist() == [
        -7971633317349779907,
        2241022855657982188,
        -344710196173077230,
        -5849497548618973496,
    ]
    assert fold(3, 1, 2, 3).item() == 7062122365395197994


def test_the_same_key_gives_the_same_number_in_any_company():
    keys = fold(5, torch.arange(1000))
    assert torch.equal(uniform(keys)[[17, 3]], uniform(keys[[17, 3]]))
    assert uniform(fold(5, 17)) == uniform(keys)[17]
    assert torch.equal(fold(5, torch.arange(3)[:, None], torch.arange(4))[2, 3], fold(5, 2, 3))


def test_every_part_and_its_place_matters():
    assert fold(0, 1, 2) != fold(0, 2, 1)
    assert fold(1, 0) != fold(0, 1)
    assert fold(0, 1) != fold(0, 1, 0)
    grid = fold(0, torch.arange(300)[:, None], torch.arange(300))
    assert len(grid.unique()) == 300 * 300


@pytest.mark.parametrize(
    "keys",
    [
        torch.arange(NUM),  # neighbours, as rows and positions are
        fold(0, torch.arange(NUM)),
        fold(torch.arange(NUM), 0),
        fold(9, torch.arange(NUM // 100)[:, None], torch.arange(100)).flatten(),
        torch.arange(NUM) << 44,
    ],
)
def test_uniform_over_distinct_keys(keys: torch.Tensor):
    found = uniform(keys)
    assert found.dtype == torch.float64
    counts = (found * 100).long().bincount(minlength=100).double()
    # 99 degrees of freedom: 0.9999 quantile 161.
    assert ((counts - NUM / 100).square() / (NUM / 100)).sum() < 161
    # Pairs of neighbours on a 10 x 10 grid: no correlation either.
    pairs = (found[::2] * 10).long() * 10 + (found[1::2] * 10).long()
    counts = pairs.bincount(minlength=100).double()
    assert ((counts - NUM / 200).square() / (NUM / 200)).sum() < 161


def test_different_streams_of_the_same_rows_are_uncorrelated():
    rows = torch.arange(NUM)
    streams = torch.stack([uniform(fold(rows, part)) for part in range(4)])
    correlation = torch.corrcoef(streams) - torch.eye(4)
    assert correlation.abs().max() < 5 / NUM**0.5  # standard error 1 / sqrt(NUM)


# The keys whose mixed value is all ones and all zeros: SplitMix64 is a bijection and can be inverted.
LAST, FIRST = 3558559446808474027, 7046029254386353131


def test_numbers_lie_strictly_between_zero_and_one():
    found = uniform(torch.tensor([FIRST, LAST]))
    assert found[0] > 0
    assert found[1] < 1
    assert found[0] < 1e-15
    assert found[1] > 1 - 1e-15


def test_keys_come_from_the_generator():
    one, same, other = (draw_keys(64, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.isin(one, other).any()
    assert one.dtype == torch.int64
    assert (one < 0).any()
    torch.manual_seed(0)
    assert torch.equal(draw_keys(64), one)


def test_the_runs_seed_is_that_of_all_draws_that_have_none_of_their_own(monkeypatch):
    assert run_seed(None) == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    rollout = RolloutCallback()
    assert (rollout.seed, rollout.cells["test"][0].seed) == (7, 7)
    assert PromptDataModule(SudokuTask()).seed == 7
    assert SFTModule("sudoku_base").seed == 7
    assert RolloutCallback(seed=0).seed == 0
