"""Keys and values of what is not fed again while a block is being decoded."""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixCache:
    """Keeps keys and values from the pass that opens a block, and joins those of the later passes to them.

    Later passes feed a window: the block, and what follows it. Before it is the prefix, and after it nothing,
    or in a dual cache (Fast-dLLM, arXiv 2505.22618) everything else.

    Args:
        length: positions before the block.
        dual: keep what is after the window, too; else it is not seen by the later passes.
    """

    def __init__(self, length: int, *, dual: bool = False) -> None:
        self.length = length
        self.dual = dual
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.state: Tensor | None = None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to; see `drift.models.KeyValueCache`."""
        if layer == len(self._keys):
            kept = keys.shape[2] if self.dual else self.length
            # Copies: a view would keep the keys of the whole sequence alive.
            self._keys.append(keys[:, :, :kept].clone())
            self._values.append(values[:, :, :kept].clone())
            return keys, values
        return self._joined(self._keys, layer, keys), self._joined(self._values, layer, values)

    def _joined(self, stored: list[Tensor], layer: int, window: Tensor) -> Tensor:
        kept, stop = stored[layer], self.length + window.shape[2]
        if kept.shape[2] < stop:
            # Once a block. The window is written in place: copying the prefix in every pass costs more.
            room = kept.new_empty((*kept.shape[:2], stop, kept.shape[3]))
            room[:, :, : self.length] = kept[:, :, : self.length]
            kept = stored[layer] = room
        kept[:, :, self.length : stop] = window
        return kept if self.dual else kept[:, :, :stop]

    @property
    def opened(self) -> bool:
        """Whether the pass that opens the block has been made."""
        return bool(self._keys)

    @property
    def state_to_keep(self) -> int | None:
        """In the opening pass the prefix's last position; see `drift.models.KeyValueCache`."""
        return None if self.opened or not self.length else self.length - 1

    def keep(self, rows: Tensor) -> None:
        """Drops all but some rows.

        Args:
            rows: [n] int64 indices, or bool, into the rows that are stored now.
        """
        self._keys = [k[rows] for k in self._keys]
        self._values = [v[rows] for v in self._values]
        self.state = None if self.state is None else self.state[rows]

    def append(self, other: PrefixCache) -> None:
        """Takes in the rows of another cache of the same length, behind its own."""
        assert (self.length, self.dual, self.opened) == (other.length, other.dual, other.opened)
        self._keys = [_stacked(*pair) for pair in zip(self._keys, other._keys, strict=True)]
        self._values = [_stacked(*pair) for pair in zip(self._values, other._values, strict=True)]
        if self.state is not None and other.state is not None:
            self.state = torch.cat((self.state, other.state))


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    # Room for a window may be there in one of them only: it holds nothing that lasts.
    length = min(one.shape[2], other.shape[2])
    return torch.cat((one[:, :, :length], other[:, :, :length]))
