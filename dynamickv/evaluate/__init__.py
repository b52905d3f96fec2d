"""Measure instead of believe: needle grids, capacity sweeps, tasks, LongBench, on the engine alone.

The metric libraries are in the extra `evaluate`; nothing here needs them before a score is taken.
"""

from dynamickv.evaluate import (
    datasets,
    longbench,
    metrics,
    needle,
    statistics,
    summary,
    sweep,
    tables,
    tasks,
    turns,
)
from dynamickv.evaluate.about import circumstances
from dynamickv.evaluate.experiment import Experiment, Measured, Stopped, methods_at, rows_of, run
from dynamickv.evaluate.journal import Journal, results_folder
from dynamickv.evaluate.share import Share

__all__ = [
    "Experiment",
    "Journal",
    "Measured",
    "Share",
    "Stopped",
    "circumstances",
    "datasets",
    "longbench",
    "methods_at",
    "metrics",
    "needle",
    "results_folder",
    "rows_of",
    "run",
    "statistics",
    "summary",
    "sweep",
    "tables",
    "tasks",
    "turns",
]
