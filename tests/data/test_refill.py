from collections.abc import Iterator

import pytest
import torch

import drift.data.refill
from drift.contract import ConfigError, PromptBatch
from drift.data.refill import RefillPrompts, require_groups
from drift.data.stream import ShuffledRows, collate_prompts
from drift.data.template import PromptTemplate
from drift.models.characters import character_tokenizer
from drift.tasks import MathTask

ROWS = [{"question": "a" * n, "ground_truth_answer": "1"} for n in range(1, 8)]
FIRST = 2**40


class Counted(ShuffledRows):
    """Rows that tell where reading began."""

    started: list[int]

    def beside(self):
        found = Counted(self.rows, self.seed + 1)
        found.started = self.started
        return found

    def starting_at(self, position: int) -> Iterator:
        self.started.append(position)
        return super().starting_at(position)


def refill(rows=ROWS) -> tuple[RefillPrompts, list[int]]:
    counted = Counted(rows, seed=0)
    counted.started = []
    template = PromptTemplate(character_tokenizer(), None, 64)

    def collate(rows, positions, update) -> PromptBatch:
        return collate_prompts(MathTask(instruction=""), template, rows, positions, update, where="rows row")

    return RefillPrompts(counted, collate), counted.started


def prompts(batch: PromptBatch) -> list[str]:
    assert batch.prompt_mask.sum(dim=1).tolist() == [len(problem.prompt) for problem in batch.problems]
    return [problem.prompt for problem in batch.problems]


def test_prompts_depend_on_their_places_alone():
    whole = prompts(refill()[0].share(0, 20))
    found, started = refill()
    for place, num in ((0, 3), (3, 2), (9, 4), (5, 2), (13, 7)):
        batch = found.share(place, num)
        assert prompts(batch) == whole[place : place + num]
        assert batch.positions.tolist() == list(range(FIRST + place, FIRST + place + num))
    # Reading goes on where it was, and begins anew only for what it has passed.
    assert started == [0, 5]


@pytest.mark.parametrize(("num", "num_ranks"), [(5, 2), (2, 4), (1, 4), (8, 4)])
def test_ranks_share_the_prompts(monkeypatch, num: int, num_ranks: int):
    whole, shares = refill()[0].share(3, num), []
    for rank in range(num_ranks):
        monkeypatch.setattr(drift.data.refill, "world_size", lambda: num_ranks)
        monkeypatch.setattr(drift.data.refill, "rank", lambda rank=rank: rank)
        shares.append(refill()[0].share(3, num))
    places = [place for share in shares for place in share.positions.tolist()]
    assert sorted(places) == whole.positions.tolist()
    by_place = dict(zip(places, [text for share in shares for text in prompts(share)], strict=True))
    assert [by_place[place] for place in sorted(places)] == prompts(whole)
    sizes = [len(share.problems) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(share.prompt_ids.dtype == torch.int64 for share in shares)


def test_a_row_that_cannot_be_used_stops_every_rank(monkeypatch):
    monkeypatch.setattr(drift.data.refill, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(drift.data.refill, "rank", lambda rank=rank: rank)
        with pytest.raises(ConfigError, match="rows row"):
            refill([*ROWS, {"question": 5}])[0].share(0, 8)


def test_groups_to_train_on_must_be_rolled_out():
    require_groups(None, 4)
    require_groups(4, 4)
    with pytest.raises(ConfigError, match=r"model\.train_groups is 5: .* only 4 groups"):
        require_groups(5, 4)
