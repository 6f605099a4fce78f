"""The training engine: one loop, its records, and the protocol of those who look on."""

from __future__ import annotations

from nextblock.train.loop import NonFiniteError, TrainResult, train
from nextblock.train.monitor import Monitor, MonitorEvent
from nextblock.train.progress import ConsoleReporter, Reporter, Tick
from nextblock.train.run_dir import RunDir, RunDirError

__all__ = [
    "ConsoleReporter",
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
