"""A batch without its padding: the decoder runs on one row of T tokens, and attention keeps its sequences apart.

Ids, spans and images stay as they are, a padded ``(B, L)`` batch: they are small. From the embeddings on, what has a
row for each token is packed, so that no layer and no logit is computed for padding. Which rows these are comes with
the batch, counted where it was made, so nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashsloth_ops import TokenIndex


@dataclass(frozen=True)
class PackedRows:
    """Where the T tokens of a padded batch are.

    Attributes:
        rows: int64 ``(T,)``, their places in the flattened ``(B, L)``, ascending.
        index: the sequences among them, positions counted in each.
        batch, length: B and L.
    """

    rows: Tensor
    index: TokenIndex
    batch: int
    length: int

    @classmethod
    def of(cls, token_rows: Tensor, cu_seqlens: Tensor, input_ids: Tensor) -> PackedRows:
        """Check and move what a collator gives to the device of ``input_ids``.

        Raises:
            ValueError, TypeError: shapes or types that do not fit.
        """
        batch, length = input_ids.shape
        for name, value in (("token_rows", token_rows), ("cu_seqlens", cu_seqlens)):
            if value.dim() != 1 or value.is_floating_point() or value.dtype == torch.bool:
                raise ValueError(
                    f"{name}: expected an integer tensor of one dimension, got {value.dtype} {tuple(value.shape)}"
                )
        if cu_seqlens.shape[0] != batch + 1:
            raise ValueError(f"cu_seqlens: expected ({batch + 1},) for {batch} rows, got {tuple(cu_seqlens.shape)}")
        rows = token_rows.to(input_ids.device, torch.int64)
        index = TokenIndex.from_cu_seqlens(cu_seqlens.to(input_ids.device), rows.shape[0], length)
        return cls(rows, index, batch, length)

    @property
    def position_ids(self) -> Tensor:
        """int64 ``(1, T)``."""
        assert self.index.positions is not None
        return self.index.positions.long()[None]

    @property
    def prepared_mask(self) -> Tensor:
        """Keeps transformers from making a mask: four dimensions are taken for one that is ready. Nothing reads it."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.rows.device)

    def pack(self, padded: Tensor) -> Tensor:
        """``(B, L, ...)`` to ``(1, T, ...)``."""
        return padded.flatten(0, 1).index_select(0, self.rows)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """``(1, T, ...)`` to ``(B, L, ...)``, zeros where there is no token."""
        flat = packed.new_zeros(self.batch * self.length, *packed.shape[2:]).index_copy(0, self.rows, packed[0])
        return flat.view(self.batch, self.length, *packed.shape[2:])

    def pack_labels(self, labels: Tensor) -> Tensor:
        """``(B, L)`` to ``(1, T)``. The first token of a sequence is not predicted: before it is another sequence."""
        return self.pack(labels).masked_fill(self.position_ids == 0, -100)
