"""Fine-tuning small enough for tests: four colours, a model 32 wide; alone, or as one rank of several."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nextblock
import tiny_runs
from nextblock.data import Source
from nextblock.evaluate import evaluation, splits
from nextblock.evaluate.evaluation import Result
from nextblock.evaluate.finetune.settings import FinetuneSettings, LoraSettings
from nextblock.interop import load
from toy import DATA, ToySource, toy_model

CPU = torch.device("cpu")
QUICK = FinetuneSettings(
    model="RUN",
    train="toy-0",
    out="OUT",
    baselines=False,
    epochs=2,
    batch_size=16,
    lr=1e-2,
    layer_decay=0.9,
    crop_scale=(0.5, 1.0),
    device="cpu",
)
LORA = replace(QUICK, lora=LoraSettings(rank=2))
ALL_RANDOM = replace(QUICK, ema_decay=0.9, drop_path=0.3, mixup=0.8, cutmix=1.0)


class Quiet(tiny_runs.Quiet):
    """Keeps what is reported; may ask the run to stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after

    def update(self, tick: Any) -> None:
        super().update(tick)
        if tick.step == self.stop_after:
            signal.raise_signal(signal.SIGTERM)


def run(
    out: Path,
    config: FinetuneSettings = QUICK,
    *,
    reporter: Quiet | None = None,
    sources: Mapping[str, Source] | None = None,
    model: Any = None,
    data: Any = DATA,
) -> Result:
    """Fine-tune on 96 toy pictures and measure on 48 others; `sources` are by purpose."""
    given = {"train": ToySource(96), **(sources or {"test": ToySource(48, seed=1)})}
    specs = {purpose: getattr(config, purpose) or purpose for purpose in given}
    known = {specs[purpose]: source for purpose, source in given.items()}
    encoder = (model or toy_model()).eval()
    settings = {**vars(config), "test": None, **specs, "out": str(out)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "open_source", lambda spec, _: known[spec])
        patch.setattr(evaluation, "open_model", lambda *_: (encoder, data))
        return nextblock.finetune(**settings, reporter=reporter or Quiet())


def run_as_rank(out: Path, config: FinetuneSettings, sources: Mapping[str, Source]) -> dict[str, Any]:
    """The same as one rank of however many the environment says."""
    return run(out, config, sources=sources).as_dict()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load(out / "classifier").state_dict()


def metrics(out: Path, run: str = "model") -> list[dict[str, Any]]:
    """Lines of metrics without the machine's part in them."""
    lines = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()]
    machine = ("images_per_s", "data_wait", "memory_gb")
    return [{name: value for name, value in line.items() if name not in machine} for line in lines]
