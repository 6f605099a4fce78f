"""Where numbers go: a JSON line each, and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsLog"]


class MetricsLog:
    """Appends to `metrics.jsonl`, flushed line by line, and mirrors the numbers to TensorBoard."""

    def __init__(self, path: Path, tensorboard_dir: Path | None, *, start_step: int) -> None:
        self._file = path.open("a")
        self._writer = None if tensorboard_dir is None else _summary_writer(tensorboard_dir, start_step)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line of `kind` ("train", "val", "monitor"); what is not finite is written as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name if "/" in name else f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _summary_writer(directory: Path, start_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=start_step + 1)
