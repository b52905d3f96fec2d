"""Where and when results were measured, for every file that holds some."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

from dynamickv.models import LoadedModel
from dynamickv.version import engine_version


def circumstances(llm: LoadedModel) -> dict[str, str]:
    """Date, model, machine and versions."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "model": llm.name,
        "revision": llm.revision,
        "dtype": llm.dtype,
        "precision": llm.precision,
        "attention": llm.attention,
        "device": _device(llm),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        **engine_version(),
    }


def _device(llm: LoadedModel) -> str:
    if llm.device.type == "cuda":
        return str(torch.cuda.get_device_name(llm.device))
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
