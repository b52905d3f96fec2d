"""A batch as one layer sees it: compressed rows without their gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamickv.integrations.vllm.compat import CommonAttentionMetadata


@dataclass(frozen=True, slots=True)
class Shape:
    """How one layer's block table differs from the scheduler's; the same from step to step while
    the batch is."""

    copies: list[Tensor | None]
    """Per row, the blocks of the compressed copy; None: the row is as the scheduler says."""
    gaps: list[int]
    """Per row, blocks in the gap."""
    places: Tensor
    """(rows, columns), which column of the copies and the scheduler's table, side by side, each
    column is."""
    written: Tensor
    """(rows, longest copy), the copies' blocks."""
    dropped: Tensor
    """(rows,), tokens in the gap; on the CPU, and on the table's device."""
    dropped_there: Tensor

    @classmethod
    def of(
        cls, copies: list[Tensor | None], gaps: list[int], table: Tensor, block_size: int
    ) -> Shape:
        """The shape of (rows, columns) `table` with copies in front and without gaps."""
        counts = torch.tensor([0 if copy is None else len(copy) for copy in copies])
        widest = int(counts.max())
        written = table.new_zeros(len(copies), widest)
        for row, copy in zip(written, copies, strict=True):
            if copy is not None:
                row[: len(copy)] = copy
        columns = torch.arange(table.shape[1])
        gap = torch.tensor(gaps)
        behind = (columns + gap[:, None]).clamp_(max=table.shape[1] - 1) + widest
        places = torch.where(columns < counts[:, None], columns, behind)
        dropped = (gap * block_size).int()
        return cls(
            copies, gaps, places.to(table.device), written, dropped, dropped.to(table.device)
        )

    def fits(self, copies: Sequence[Tensor | None], gaps: Sequence[int], table: Tensor) -> bool:
        """Whether it is the shape of these rows, too."""
        return (
            self.places.shape == table.shape
            and self.gaps == gaps
            and all(ours is theirs for ours, theirs in zip(self.copies, copies, strict=True))
        )

    def apply(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The batch with copies and without gaps."""
        upper = common.seq_lens_cpu_upper_bound - self.dropped
        both = torch.cat([self.written, common.block_table_tensor], dim=1)
        return common.replace(
            block_table_tensor=both.gather(1, self.places),
            seq_lens=common.seq_lens - self.dropped_there,
            seq_lens_cpu_upper_bound=upper,
            max_seq_len=int(upper.max()),
            _num_computed_tokens_cache=None,
        )
