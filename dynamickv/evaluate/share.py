"""Which part of the work is this process's, under `accelerate launch` or `torchrun`.
 Alone, it is all of it. Processes agree on the list of work through their first one and write to
files of their own, so the folder of results must be one that all of them see. What they tell each
other is small and goes through the host's memory: several of them may share a GPU, which NCCL would
refuse.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

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

    @classmethod
    def of_this_process(cls) -> Share:
        """What the launcher's environment says. Processes of one host take its GPUs in turn."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world < 2:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        gpus = torch.cuda.device_count()
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"
        return cls(dist.get_rank(), world, device)

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def mine(self, work: Sequence[Item]) -> list[Item]:
        """Every `world`-th item of the first process's list, from `rank` on."""
        agreed = [list(work)]
        if dist.is_initialized():
            dist.broadcast_object_list(agreed)
        return agreed[0][self.rank :: self.world]

    def leave(self) -> None:
        """Once every process is here; no work can be shared after it."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
