"""How much memory is free, and what happens when there was not enough: one sentence, and
everything given back.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
READING, CHOOSING, ANSWERING = "reading the prompt", "choosing what to keep", "answering"
ATTENDING = "reading what the answer attends to"
REMEDIES = {
    READING: "shorten the document",
    CHOOSING: "choose fewer methods or lower the capacity",
    ANSWERING: "choose fewer methods, or lower the capacity or max_new_tokens",
    ATTENDING: "answer with fewer methods, or a lower max_new_tokens",
}


class OutOfMemory(MemoryError):
    """A comparison did not fit into memory; says in which stage and what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python means this: torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what nothing refers to any more, to the device's other users too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory() -> tuple[str, int]:
    """The device that models are loaded on here, "cuda" or "cpu", and its free bytes."""
    if torch.cuda.is_available():
        return "cuda", int(torch.cuda.mem_get_info()[0])
    return "cpu", free_host_memory()


def free_host_memory() -> int:
    """Free bytes for models on the CPU: the least of what the machine and this process's container
    have left."""
    left = int(psutil.virtual_memory().available)
    return min(left, _container_left(CGROUP) or left)


def free_on(device: torch.device) -> int:
    """Bytes that this process could still take there, what torch holds and does not use counted."""
    if device.type != "cuda":
        return free_host_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def bytes_per_value(device: str) -> int:
    """Bytes of one weight as `load_model` loads it there by default: float32 or bfloat16."""
    return 4 if device == "cpu" else 2


def _container_left(folder: Path) -> int | None:
    """Bytes that a version 2 control group leaves, file cache counted as free; None without one."""
    try:
        limit = (folder / "memory.max").read_text("ascii").strip()
        used = int((folder / "memory.current").read_text("ascii"))
        rows = (line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        cached = {name: int(value) for name, value in rows}.get("inactive_file", 0)
        return max(int(limit) - used + cached, 0)
    except (OSError, ValueError):  # no such files, or "max": no limit
        return None


@contextmanager
def memory_watched(stage: str) -> Iterator[None]:
    """Turn running out of memory in this stage, a key of `REMEDIES`, into one sentence.

    Raises:
        OutOfMemory: what to lower; what the failed work held is given back.
    """
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The frames of the failed work hold its tensors.
        traceback.clear_frames(error.__traceback__)
    release_memory()
    raise OutOfMemory(f"Out of memory while {stage}: {REMEDIES[stage]}.")
