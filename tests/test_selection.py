from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import drift.selection
from drift.contract import Rollout
from drift.selection import best_groups, concatenated, count_useful

# Twelve groups of two by place: rewards of its rows. Useful are 1, 4, 5, 8 and 11.
REWARDS = {place: (float(place % 3 == 1 or place in (5, 8, 11)), 0.0) for place in range(12)}
USEFUL = [1, 4, 5, 7, 8, 10, 11]


def rollout_of(*places: int, width: int = 3) -> Rollout:
    """Two rows for each place, which say whose they are; prompts have 1, 2 or 3 tokens, by place."""
    rows = torch.tensor([place for place in places for _ in range(2)])
    member = torch.arange(2).repeat(len(places))
    lengths = rows % 3 + 1
    mask = torch.arange(width) >= width - lengths[:, None]
    ids = (10 * rows + member)[:, None]
    return Rollout(
        prompt_ids=torch.where(mask, ids, 0),
        prompt_mask=mask,
        completion_ids=ids.expand(-1, 4),
        completion_mask=torch.ones(len(rows), 4, dtype=torch.bool),
        step_map=ids.expand(-1, 4),
        num_timesteps=rows + 1,
        num_forwards=5,
        rewards=torch.tensor([REWARDS[place][i] for place in places for i in range(2)])[:, None],
        positions=rows,
        seconds=1.0,
    )


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Rollout]]:
    """What every rank gets, of the rollouts that each holds; ranks are played one after the other."""

    def run(held: list[list[Rollout]], num_groups: int) -> list[Rollout]:
        said: list[list] = []  # by round of gathering, what each rank said

        def play(rank: int, known: list[list]) -> tuple[list, Rollout | None]:
            spoken = []

            def gather(value):
                spoken.append(value)
                if len(known) < len(spoken):
                    raise InterruptedError  # the others have not spoken yet
                return known[len(spoken) - 1]

            monkeypatch.setattr(drift.selection, "world_size", lambda: len(held))
            monkeypatch.setattr(drift.selection, "rank", lambda: rank)
            monkeypatch.setattr(drift.selection, "gather_over_ranks", gather)
            try:
                return spoken, best_groups(held[rank], 2, num_groups)
            except InterruptedError:
                return spoken, None

        while True:
            played = [play(rank, said) for rank in range(len(held))]
            if all(found is not None for _, found in played):
                return [found for _, found in played if found is not None]
            said.append([spoken[-1] for spoken, _ in played])

    return run


def places_of(rollout: Rollout, which: Tensor | None = None) -> list[int]:
    assert rollout.positions is not None
    rows = rollout.positions if which is None else rollout.positions[which]
    return rows[::2].tolist()


# How twelve groups may lie on the ranks: in two rounds, of which the second has fewer prompts than ranks.
HELD = {
    1: [[rollout_of(*range(8)), rollout_of(8, 9, 10, 11, width=9)]],
    2: [[rollout_of(0, 1, 2, 3), rollout_of(8, 10)], [rollout_of(4, 5, 6, 7), rollout_of(9, 11, width=7)]],
    4: [
        [rollout_of(0, 1), rollout_of(8)],
        [rollout_of(2, 3, width=5), rollout_of(9, 11)],
        [rollout_of(4, 5), rollout_of(10)],
        [rollout_of(6, 7)],
    ],
}


@pytest.mark.parametrize("num_groups", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_number_of_ranks_trains_on_the_same_groups(on_ranks, num_ranks: int, num_groups: int):
    shares = on_ranks(HELD[num_ranks], num_groups)
    trained = [place for share in shares for place in places_of(share, share.trained)]
    # All that are useful in their order; an eighth is the one all wrong that took most timesteps.
    assert trained == sorted([*USEFUL, 9][:num_groups])
    assert {len(share.positions) for share in shares} == {2 * -(-num_groups // num_ranks)}
    for share in shares:
        # Rows came whole: each still says whose it is.
        for row, place in enumerate(share.positions.tolist()):
            name = 10 * place + row % 2
            assert set(share.completion_ids[row].tolist()) == set(share.step_map[row].tolist()) == {name}
            assert share.prompt_ids[row][share.prompt_mask[row]].tolist() == [name] * (place % 3 + 1)
            assert float(share.rewards[row]) == REWARDS[place][row % 2]
        assert share.prompt_ids.shape[1] == max(place % 3 + 1 for place in places_of(share))
    # A rank's own passes, wherever its rows have gone.
    assert [share.num_forwards for share in shares] == [5 * len(held) for held in HELD[num_ranks]]


def test_what_cannot_be_shared_evenly_is_filled_up_with_groups_that_are_not_trained_on(on_ranks):
    shares = on_ranks(HELD[4], 3)
    assert [places_of(share) for share in shares] == [[1], [4], [5], [0]]
    assert [share.trained.tolist() for share in shares] == [[True] * 2] * 3 + [[False] * 2]


def test_useful_groups_are_those_whose_rewards_differ():
    assert count_useful(rollout_of(*range(12)), 2, torch.device("cpu")) == len(USEFUL)
    assert count_useful(None, 2, torch.device("cpu")) == 0


def test_rollouts_are_put_together_with_prompts_of_other_lengths():
    found = concatenated([rollout_of(2, width=3), rollout_of(5, width=6)])
    assert found.prompt_ids.tolist() == [
        [0, 0, 0, 20, 20, 20],
        [0, 0, 0, 21, 21, 21],
        [0, 0, 0, 50, 50, 50],
        [0, 0, 0, 51, 51, 51],
    ]
    assert found.prompt_mask.sum(dim=1).tolist() == [3] * 4
    assert (found.num_forwards, found.seconds) == (10, 2.0)
