"""Which part of the work is this process's, under `accelerate launch` or `torchrun`.
 Alone, it is all of it. Processes agree on the list of work through their first one and write to
files of their own, so the folder of results must be one that all of them see.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the others."""


@dataclass(frozen=True)
class Share:
    """One process among `world`."""

    rank: int = 0
    world: int = 1
    device: str = "auto"
    """Where this process's model belongs, as `load_model` takes it."""
    state: Any = None

    @classmethod
    def of_this_process(cls) -> Share:
        """What the launcher's environment says."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, str(state.device), state)

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def mine(self, work: Sequence[Item]) -> list[Item]:
        """Every `world`-th item of the first process's list, from `rank` on."""
        agreed = [list(work)]
        if self.state is not None:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(agreed)
        return agreed[0][self.rank :: self.world]

    def leave(self) -> None:
        """Once every process is here; no work can be shared after it."""
        if self.state is not None:
            self.state.wait_for_everyone()
            self.state.destroy_process_group()
