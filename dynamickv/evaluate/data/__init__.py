"""Data files that come with the package: LongBench's prompts and answer lengths as it publishes
them, metrics per task, the paper's figures, and what sentences are made of."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache
def data_file(name: str) -> Any:
    """The content of one of the JSON files here; not to be changed."""
    return json.loads((Path(__file__).parent / name).read_text("utf-8"))
