"""Runs small enough for tests: 16-px pictures in four blocks, a model 16 wide; monitors that make trouble."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.config import CheckpointConfig, DataConfig, MonitorConfig, OptimConfig, RunConfig, TrainConfig
from nextblock.data import Source, normalize
from nextblock.models import NextBlockModel
from nextblock.optim import build_optimizer
from nextblock.presets import resolve
from nextblock.train import Monitor, MonitorEvent, Reporter, Tick, TrainResult, train
from nextblock.train.distributed import ALONE
from nextblock.train.state import take_snapshot, write_snapshot
from toy import ToySource, tiny_config, tiny_model

CPU = torch.device("cpu")

# Nothing here gains from a second thread, and all of it loses much where other work holds the cores.
torch.set_num_threads(1)

TINY = RunConfig(
    model=tiny_config(
        image_size=16,
        embed_dim=16,
        num_heads=2,
        projection_dim=16,
        predictor_depth=1,
        block_mlp_dim=16,
    ),
    data=DataConfig(val_resize_px=16, workers=0),
    optim=OptimConfig(warmup="2st"),
    train=TrainConfig(duration="7st", batch_size=8, precision="fp32", device="cpu"),
    checkpoint=CheckpointConfig(every="1000st"),
    monitor=MonitorConfig(log_every="1st", pictures_every=None, knn_every=None, tensorboard=False),
)

ALL_RANDOM = {
    "model.drop_path": 0.3,
    "model.order": "random",
    "train.micro_batch_size": 3,
    "monitor.log_every": "3st",
}
"""All that draws random numbers, micro-batches that do not divide the batch, windows of three steps."""

EMBEDDING = {
    "model.target": "embedding",
    "model.order": "per_image",
    "model.class_token": True,
    "model.positions": "rope",
    "model.rope_rescale": 2.0,
}
TOKENS = {"model.target": "tokens", "model.vocab_size": 6}
MASKED = {"model.mask_ratio": 0.5, "model.order": "per_image", "model.feature_attention": "full"}

TINY_FLAGS = (
    *("--preset", "xtra-tiny", "--train.device", "cpu", "--data.workers", "0", "--data.val_resize_px", "16"),
    *("--model.image_size", "16", "--model.embed_dim", "16", "--model.depth", "1", "--model.num_heads", "2"),
    *("--model.projection_dim", "16", "--model.predictor_dim", "16", "--model.predictor_depth", "1"),
    *("--model.predictor_heads", "2", "--model.block_mlp_dim", "16", "--train.batch_size", "8"),
    *("--monitor.pictures_every", "null", "--monitor.knn_every", "null", "--monitor.tensorboard", "false"),
    *("--train.duration", "3st", "--monitor.log_every", "1st"),
)
"""A run of three steps on the command line; a later flag wins over an earlier one."""


def settings(changes: Mapping[str, Any] | None = None) -> RunConfig:
    return resolve(TINY, changes or {})


def run_toy(
    out: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    stop: int | None = None,
    monitors: Sequence[Monitor] = (),
    sources: Mapping[str, Source] | None = None,
    reporter: Quiet | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Train `TINY` with some settings changed, on 40 toy pictures by default, up to step `stop`."""
    stopping = [] if stop is None else [SignalAt(stop, signal.SIGINT)]
    return train(
        settings(changes),
        out,
        dict(sources or {"train": ToySource(40)}),
        monitors=[*monitors, *stopping],
        reporter=reporter or Quiet(),
        overwrite=overwrite,
    )


def crash_toy(
    out: Path, step: int, changes: Mapping[str, Any] | None = None, *, monitors: Sequence[Monitor] = ()
) -> None:
    """The same, ended after a step without a chance to save."""
    with pytest.raises(ZeroDivisionError):
        run_toy(out, changes, monitors=[*monitors, After(step, lambda *_: 1 / 0)])


class Quiet(Reporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.notes: list[str] = []
        self.ticks: list[Tick] = []
        self.moves: list[tuple[int, float]] = []
        self.measured: list[tuple[str, int, int]] = []

    def begin(self, step: int, total_steps: int) -> None:
        self.began_at = (step, total_steps)

    def within(self, step: int, share: float) -> None:
        self.moves.append((step, share))

    def update(self, tick: Tick) -> None:
        self.ticks.append(tick)

    def measuring(self, what: str, done: int, total: int) -> None:
        self.measured.append((what, done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


class After:
    """Does something after a step."""

    every = "1st"

    def __init__(self, step: int, act: Callable[[NextBlockModel, MonitorEvent], object]) -> None:
        self.step, self.act = step, act

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        if event.step == self.step:
            self.act(model, event)
        return {}


class SignalAt(After):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__(step, lambda *_: os.kill(os.getpid(), number))


class Remember:
    """Keeps a copy of the weights after every step."""

    every = "1st"

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.weights[event.step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {}


class Meddle:
    """Draws from every global generator and reseeds them, as a thoughtless monitor might."""

    every = "2st"

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        torch.manual_seed(event.step)
        np.random.seed(event.step)  # noqa: NPY002 - the global generator is what this is about
        random.seed(event.step)
        model.train()
        return {"meddle/sum": torch.rand(()).item() + np.random.rand() + random.random()}  # noqa: NPY002


def write_teacher(path: Path, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Write a small model, and give the settings of a run that predicts its features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed, **{"image_size": 8, "embed_dim": 12, "num_heads": 2, **changes})
    save_model(path, model, data=DataConfig(val_resize_px=8))
    return {"model.target": "features", "model.teacher": str(path), "model.teacher_dim": 12}


def blocks_of(source: ToySource, side_px: int) -> Tensor:
    """The blocks of all images in raster order, each normalised: [images, blocks, values]."""
    images = normalize(source.images, TINY.data.mean, TINY.data.std)
    blocks = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=side_px, q=side_px)
    return (blocks - blocks.mean(-1, keepdim=True)) / blocks.std(-1, keepdim=True)


def save_checkpoint(
    directory: Path, model: NextBlockModel, state: Any, step: int, data: DataConfig | None = None
) -> Path:
    """Write `directory/step_XXXXXXXX` from a single process."""
    snapshot = take_snapshot(model, build_optimizer(model, OptimConfig()), state, {})
    return write_snapshot(directory, snapshot, step, ALONE, data=data)


def call_cli(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, standard output, standard error."""
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


def refused(told: tuple[int, str, str], code: int = 2) -> str:
    """Check that a command failed with this code and a message instead of a traceback; return the message."""
    assert told[0] == code, told
    assert told[1] == ""
    assert "Traceback" not in told[2]
    return told[2].strip().splitlines()[-1]


def write_images(folder: Path, count: int, *, broken: int = 0) -> None:
    """Write noisy pictures of 20 x 16 px as PNG, and some that cannot be read, in sorted order after them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    whole = (folder / "0000.png").read_bytes()
    contents = [whole[:60], b"", b"this is no picture"]
    for index in range(broken):
        (folder / f"broken_{index:02d}.png").write_bytes(contents[index % 3])


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def logged_steps(run: Path, kind: str = "train") -> list[int]:
    return [line["step"] for line in metrics(run, kind)]


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def loss_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of training without the machine's part in them."""
    machine = ("images_per_s", "data_wait", "memory_gb", "tflops")
    return [{name: value for name, value in line.items() if name not in machine} for line in metrics(run)]


def same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and numbers are equal, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(run: Path, other: Path, step: int = 7) -> None:
    """Weights, optimizer and loss curve of two runs agree bit for bit after `step` steps."""
    folders = [one / "checkpoints" / f"step_{step:08d}" for one in (run, other)]
    states = [json.loads((folder / "state.json").read_text()) for folder in folders]
    assert same(weights(run, step), weights(other, step))
    assert same(*(load_file(folder / "optimizer.safetensors") for folder in folders))
    assert [state["step"] for state in states] == [step, step]
    assert states[0]["window"]["losses"] == states[1]["window"]["losses"]
    assert loss_lines(run) == loss_lines(other)
