import torch

from drift.contract import Rollout, SampleError


def test_select_takes_rows_of_every_tensor():
    rollout = Rollout(
        prompt_ids=torch.arange(6).view(3, 2),
        prompt_mask=torch.ones(3, 2, dtype=torch.bool),
        completion_ids=torch.arange(9).view(3, 3),
        completion_mask=torch.ones(3, 3, dtype=torch.bool),
        step_map=torch.arange(9).view(3, 3),
        seeds=torch.tensor([7, 8, 9]),
        num_forwards=5,
    )
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        order = [2, 0] if rows.dtype == torch.int64 else [0, 2]
        some = rollout.select(rows)
        assert some.completion_ids.tolist() == rollout.completion_ids[order].tolist()
        assert some.seeds.tolist() == rollout.seeds[order].tolist()
        assert (some.num_forwards, some.token_probs, some.rewards) == (5, None, None)
    assert len(rollout.seeds) == 3


def test_a_sample_error_carries_its_sample():
    sample = {"prompt": "2 + 2"}
    error = SampleError("look", sample)
    sample["prompt"] = "changed"
    assert (str(error), error.sample) == ("look", {"prompt": "2 + 2"})
