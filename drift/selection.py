"""The groups to train on, chosen among those of all ranks and dealt out evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import pad

from drift.advantages import groups_with_spread, select_groups
from drift.contract import Rollout
from drift.distributed import gather_over_ranks, rank, sum_over_ranks, world_size


def count_useful(rollout: Rollout | None, group_size: int, device: torch.device) -> int:
    """Groups of all ranks whose rewards differ.

    Args:
        rollout: this rank's, with rewards; None: it has none.
        group_size: completions of a prompt.
        device: where the ranks communicate.
    """
    own = 0 if rollout is None else groups_with_spread(_rewards(rollout), group_size).sum()
    return int(sum_over_ranks(torch.as_tensor(own, device=device)))


def best_groups(rollouts: Sequence[Rollout], group_size: int, num_groups: int) -> Rollout:
    """This rank's share of the groups to train on; all shares together are the same for any number of ranks.

    The groups are dealt out in the order of their prompts' places, equally many to each rank. Where they
    cannot be shared evenly, the last ones that are dealt are not trained on.

    Args:
        rollouts: this rank's, with rewards and positions; in each, groups one after the other.
        group_size: completions of a prompt.
        num_groups: groups that `select_groups` is to choose. All ranks together must hold as many, rounded up
            to a multiple of the ranks.

    Returns:
        the rows, with `trained`; passes and seconds are those that this rank's rollouts took.
    """
    own = concatenated(rollouts)
    assert own.positions is not None
    assert own.num_timesteps is not None
    told = gather_over_ranks([x.cpu() for x in (own.positions, _rewards(own), own.num_timesteps)])
    positions, rewards, timesteps = (torch.cat(parts) for parts in zip(*told, strict=True))
    # By their places, whoever has rolled them out.
    places, order = positions[::group_size].sort()
    rows = (order[:, None] * group_size + torch.arange(group_size)).flatten()
    chosen = select_groups(rewards[rows], timesteps[rows], group_size, num_groups)[::group_size] // group_size
    is_spare = torch.ones_like(places, dtype=torch.bool)
    is_spare[chosen] = False
    dealt = torch.cat((places[chosen], places[is_spare][: -len(chosen) % world_size()]))
    # Rewards are small; of the rollouts only what is dealt out goes round.
    sent = own.select(torch.isin(own.positions, dealt.to(own.positions.device)))
    rollout = concatenated(gather_over_ranks(move_data_to_device(sent, torch.device("cpu"))))
    assert rollout.positions is not None
    mine = dealt.unflatten(0, (world_size(), -1))[rank()]
    found = _trimmed(rollout.select((mine[:, None] == rollout.positions).nonzero()[:, 1]))
    assert found.positions is not None
    found.trained = torch.isin(found.positions, places[chosen])
    found.num_forwards, found.seconds = own.num_forwards, own.seconds
    return move_data_to_device(found, own.completion_ids.device)


def concatenated(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of the rows of several, whose prompts may have other lengths."""
    width = max(part.prompt_ids.shape[1] for part in rollouts)
    parts = [_padded(part, width) for part in rollouts]
    rows = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(Rollout)
        if isinstance(getattr(parts[0], field.name), Tensor)
    }
    num_forwards, seconds = sum(part.num_forwards for part in parts), sum(part.seconds for part in parts)
    return replace(parts[0], **rows, num_forwards=num_forwards, seconds=seconds)


def _rewards(rollout: Rollout) -> Tensor:
    assert rollout.rewards is not None
    return rollout.rewards.sum(dim=1)


def _padded(rollout: Rollout, width: int) -> Rollout:
    """The rollout with its prompts left-padded to a width; nobody looks at the padding's ids."""
    more = (width - rollout.prompt_ids.shape[1], 0)
    prompt_ids, prompt_mask = pad(rollout.prompt_ids, more), pad(rollout.prompt_mask, more)
    return replace(rollout, prompt_ids=prompt_ids, prompt_mask=prompt_mask)


def _trimmed(rollout: Rollout) -> Rollout:
    """The rollout without padding that all its rows have."""
    width = int(rollout.prompt_mask.sum(dim=1).max())
    prompt_ids, prompt_mask = rollout.prompt_ids[:, -width:], rollout.prompt_mask[:, -width:]
    return replace(rollout, prompt_ids=prompt_ids, prompt_mask=prompt_mask)
