"""The training engine: one loop, its records, its screen, and the protocol of monitors."""

from __future__ import annotations

from nextblock.train.logging import Reporter, Tick
from nextblock.train.loop import Monitor, MonitorEvent, NonFiniteError, TrainResult, train
from nextblock.train.run_dir import DamagedRunError, RunDir, RunDirError

__all__ = [
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
