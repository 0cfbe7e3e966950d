"""Keys and values of everything before the block that is being decoded."""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixCache:
    """Stores the prefix in the pass that opens a block, and puts it before the window in later passes.

    Args:
        length: positions before the block.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._state: Tensor | None = None
        self._opened = False

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to; see `drift.models.KeyValueCache`."""
        if layer == len(self._keys):
            # Copies: a view would keep the keys of the whole sequence alive.
            self._keys.append(keys[:, :, : self.length].clone())
            self._values.append(values[:, :, : self.length].clone())
            return keys, values
        return torch.cat((self._keys[layer], keys), dim=2), torch.cat((self._values[layer], values), dim=2)

    def state_before(self, states: Tensor) -> Tensor | None:
        """The state of the prefix's last position, as stale as its keys; see `drift.models.KeyValueCache`."""
        if self._opened:
            return self._state
        self._opened = True
        if self.length:
            self._state = states[:, self.length - 1 : self.length].clone()
        return None

    def keep(self, rows: Tensor) -> None:
        """Drops all but some rows.

        Args:
            rows: [n] int64 indices, or bool, into the rows that are stored now.
        """
        self._keys = [k[rows] for k in self._keys]
        self._values = [v[rows] for v in self._values]
        self._state = None if self._state is None else self._state[rows]
