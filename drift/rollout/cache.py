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

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to; see `drift.models.KeyValueCache`."""
        if layer == len(self._keys):
            # Copies: a view would keep the keys of the whole sequence alive.
            self._keys.append(keys[:, :, : self.length].clone())
            self._values.append(values[:, :, : self.length].clone())
            return keys, values
        return torch.cat((self._keys[layer], keys), dim=2), torch.cat((self._values[layer], values), dim=2)

    def keep(self, rows: Tensor) -> None:
        """Drops all but some rows.

        Args:
            rows: [n] int64 indices, or bool, into the rows that are stored now.
        """
        self._keys = [k[rows] for k in self._keys]
        self._values = [v[rows] for v in self._values]
