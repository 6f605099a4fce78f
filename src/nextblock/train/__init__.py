"""The training engine: the loop, run records, progress display, and the monitor protocol."""

from __future__ import annotations

from nextblock.train.logging import Reporter, Tick
from nextblock.train.loop import CollapseError, NonFiniteError, TrainResult, train
from nextblock.train.monitors import Monitor, MonitorEvent
from nextblock.train.run_dir import DamagedRunError, RunDir, RunDirError

__all__ = [
    "CollapseError",
    "DamagedRunError",
    "Monitor",
    "MonitorEvent",
    "NonFiniteError",
    "Reporter",
    "RunDir",
    "RunDirError",
    "Tick",
    "TrainResult",
    "train",
]
