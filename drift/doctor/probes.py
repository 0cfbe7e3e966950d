"""Texts to probe a policy with: some of their tokens are masked, and the policy is asked for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

# Any language model that has been trained at all finds most of what is masked in these.
_TEXTS = (
    "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday, Wednesday",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 = 6, 4 + 4 = 8, 5 + 5 = 10, 6 + 6 = 12, 7 + 7 = 14, 8 + 8 = 16",
    "The capital of France is Paris, the capital of Italy is Rome, the capital of Spain is Madrid.",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g h i j k l m n o p q r s t",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n\n\ndef multiply(a, b):\n",
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A text of which some tokens may be masked.

    Args:
        ids: its tokens.
        start: the first token that may be masked: the prompt's length where a demonstration follows it.
    """

    ids: list[int]
    start: int = 0


def built_in_probes(tokenizer: PreTrainedTokenizerFast) -> list[Probe]:
    """Sentences that go on as everybody expects."""
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _TEXTS]
    return [Probe(ids=list(ids)) for ids in found if len(ids) >= 2]  # pyright: ignore[reportArgumentType]


def random_probes(legal: list[int]) -> list[Probe]:
    """Two texts of random tokens, for checks that no language is needed for.

    Args:
        legal: the ids to choose from.
    """
    ids, generator = torch.tensor(legal), torch.Generator().manual_seed(0)
    return [Probe(ids=ids[torch.randint(len(ids), (n,), generator=generator)].tolist()) for n in (24, 32)]


def batch_of(probes: list[Probe], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded probes.

    Returns:
        ids [B,L] int64, mask [B,L] bool (False at padding), and asked [B,L] bool: every third token that may
        be masked, never the first two of a row, so that its neighbours are there.
    """
    length = max(len(probe.ids) for probe in probes)
    ids = torch.full((len(probes), length), pad_token_id)
    mask, asked = (torch.zeros(len(probes), length, dtype=torch.bool) for _ in range(2))
    for row, probe in enumerate(probes):
        first = length - len(probe.ids)
        ids[row, first:] = torch.tensor(probe.ids)
        mask[row, first:] = True
        asked[row, first + max(probe.start, 2) :: 3] = True
    return ids, mask, asked
