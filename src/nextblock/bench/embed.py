"""`nextblock bench embed`: writing features of images, against the rate at which this machine multiplies.

Measured is all that `nextblock embed` does for each image: reading, cropping, the encoder, the file; not the
hash of the weights, which is taken once. The first row holds the arithmetic that the encoder needs in that
time beside the rate of plain matrix products of the encoder's own shapes (`gemm.py`). Further rows tell what
a part costs: the mask of native attention, the number of images at a time, and, in seconds as they pass, JPEG
files that workers decode while the encoder runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from nextblock.bench.flops import encode_flops
from nextblock.bench.gemm import GEMM_TARGET, GemmRates, gemm_rates
from nextblock.bench.measure import (
    BenchResult,
    Clock,
    Row,
    Stopwatch,
    peak_memory_mb,
    set_up,
    synchronizer,
    take_turns,
)
from nextblock.config import ModelConfig
from nextblock.presets import model_config
from nextblock.settings import check_types, from_dict, require, to_dict

if TYPE_CHECKING:
    from nextblock.data import Source

__all__ = ["EmbedBench", "measure_embed"]

GEMM_SHARE = 0.8
"""What the share of the GEMM rate should reach, with the model of the default in fp32."""
EMBED_TARGET = "nextblock.bench.embed:measure_embed"
OTHER_BATCHES = (4, 8, 32, 64)
WARMUP_BATCHES = 1

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EmbedBench:
    """What to measure, and how long."""

    model: str = "xtra-b16"
    """Size or preset."""
    image_size: int | None = None
    """Side of the image in pixels; null: the model's."""
    batch_size: int = 16
    """Images that go through the encoder at a time, in all rows but those of other batches."""
    images: int = 64
    """Images in a turn, besides those of a batch that comes first."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where; auto: CUDA, then MPS, then CPU."""
    threads: int | None = None
    """Threads of every process; null: as many as torch takes by itself."""
    clock: Clock = "wall"
    """Seconds as they pass, or CPU seconds: with `--threads 1`, for a machine that is not yours alone."""
    rounds: int = 3
    """How often each variant has its turn, every time in a new process."""
    quick: bool = False
    """One round of one batch, without other batches: a first idea."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "images", "rounds"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; use at least 1")
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}; use at least 1")

    @property
    def config(self) -> ModelConfig:
        """The encoder that is measured, without what only training needs."""
        size = {} if self.image_size is None else {"image_size": self.image_size}
        return model_config(self.model, **size, predictor=None, drop_path=0.0, init=None)

    @property
    def _has_budget(self) -> bool:
        return (self.model, self.precision, self.quick) == (EmbedBench.model, "fp32", False)

    def run(self) -> BenchResult:
        """Measure all variants, and compare."""
        results = take_turns(self._jobs(), 1 if self.quick else self.rounds)
        gemm = gemm_rates(results["gemm"])
        first = results["native"][0]
        return BenchResult(
            bench="embed",
            rows=tuple(self._rows(results, gemm.gflops)),
            machine={name: first[name] for name in ("device", "threads", "torch")},
            details={
                "model": self.model,
                "batch_size": self.batch_size,
                "precision": self.precision,
                "clock": self.clock,
                **gemm.details,
                "encoder_gflop_per_image": encode_flops(self.config) / 1e9,
                "images_per_s": {
                    name: [run["images_per_s"] for run in runs]
                    for name, runs in results.items()
                    if name != "gemm"
                },
                "peak_memory_mb": {
                    name: max(run["peak_memory_mb"] for run in runs)
                    for name, runs in results.items()
                    if name != "gemm"
                },
            },
            notes=self._notes(first, gemm),
        )

    def _jobs(self) -> dict[str, tuple[str, dict[str, Any]]]:
        common = {name: getattr(self, name) for name in ("precision", "device", "threads", "clock")}
        job = {
            **common,
            "model": to_dict(self.config),
            "batch_size": self.batch_size,
            "images": self.batch_size if self.quick else self.images,
            "attention": "native",
            "is_jpeg": False,
        }
        others = [] if self.quick else [size for size in OTHER_BATCHES if size != self.batch_size]
        gemm = {**common, "shapes": self._shapes(), "quick": self.quick}
        return {
            "gemm": (GEMM_TARGET, gemm),
            "native": (EMBED_TARGET, job),
            "full": (EMBED_TARGET, {**job, "attention": "full"}),
            # The CPU seconds of workers are not those of the process that is timed.
            **({} if self.clock == "cpu" else {"jpeg": (EMBED_TARGET, {**job, "is_jpeg": True})}),
            **{f"batch {size}": (EMBED_TARGET, {**job, "batch_size": size}) for size in others},
        }

    def _shapes(self) -> list[tuple[int, int, int]]:
        """The encoder's largest products."""
        config = self.config
        tokens = self.batch_size * config.num_blocks * config.patches_per_block
        width, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        return [(tokens, width, hidden), (tokens, hidden, width)]

    def _rows(self, results: dict[str, list[Result]], gemm_gflops: float) -> Iterable[Row]:
        gflop = encode_flops(self.config) / 1e9
        native = _per_s(results["native"])
        yield Row(
            what="encoder flops of embedding / GEMM",
            ours=native * gflop,
            plain=gemm_gflops,
            unit="GFLOP/s",
            ratio=native * gflop / gemm_gflops,
            at_least=GEMM_SHARE if self._has_budget else None,
        )
        names = {
            "native": "images in memory, native attention",
            "full": "the same, full attention",
            "jpeg": "JPEG files, decoded by workers",
        }
        for name, runs in results.items():
            if name != "gemm":
                per_s = _per_s(runs)
                yield Row(
                    what=names.get(name, f"{name.replace('batch', 'batches of')}"),
                    ours=per_s,
                    unit="images/s",
                    ratio=per_s / native,
                )

    def _notes(self, first: Result, gemm: GemmRates) -> tuple[str, ...]:
        return (
            f"{self.model}, batch {self.batch_size}, {self.precision}, on {first['device']}"
            + (", in CPU seconds" if self.clock == "cpu" else ""),
            f"encoder flops: {encode_flops(self.config) / 1e9:.1f} GFLOP an image, of its matrix products",
            "ratios below the first row: to images in memory, native attention",
            gemm.note,
        )


def _per_s(runs: Iterable[Result]) -> float:
    return median(run["images_per_s"] for run in runs)


# ----------------------------------------------------------------------------------------------- measuring


def measure_embed(job: dict[str, Any]) -> dict[str, Any]:
    """Images a second of writing features to a file, after a batch that is not counted; peak memory."""
    import torch

    from nextblock.models import NextBlockModel
    from nextblock.train.runtime import device_name, process_settings

    device = set_up(job["device"], job["threads"])
    model = NextBlockModel(from_dict(ModelConfig, job["model"]))
    watch = Stopwatch(synchronizer(device), job["clock"])
    with tempfile.TemporaryDirectory() as folder, process_settings(device):
        for label, images in (("warm-up", WARMUP_BATCHES * job["batch_size"]), ("embed", job["images"])):
            _embed(model, job, Path(folder), images, watch, label)
    return {
        "images_per_s": job["images"] / (watch.total_s("embed") - watch.total_s("embed identity")),
        "peak_memory_mb": peak_memory_mb(device.type),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _embed(model: Any, job: dict[str, Any], folder: Path, images: int, watch: Stopwatch, label: str) -> None:
    """Embed so many images as the command does, with all opened; timed under a label."""
    from nextblock.config import DataConfig
    from nextblock.evaluate.embed import run as embed_module
    from nextblock.evaluate.embed.config import EmbedConfig

    data = replace(DataConfig(), val_resize_px=max(_size_px(model.config)))
    source = _source(folder / f"{label} images", images, model.config, is_jpeg=job["is_jpeg"], data=data)
    config = EmbedConfig(
        model="bench",
        data=source.spec,
        out=str(folder / f"{label}.npy"),
        attention=job["attention"],
        encode_batch_size=job["batch_size"],
        precision=job["precision"],
        device=job["device"],
    )
    with watch.watch(embed_module, "identity_of", f"{label} identity"), watch.lap(label):
        embed_module.embed_model(model, config, source, data)


def _size_px(config: ModelConfig) -> tuple[int, int]:
    return config.block_grid[0] * config.block_px[0], config.block_grid[1] * config.block_px[1]


def _source(folder: Path, images: int, config: ModelConfig, *, is_jpeg: bool, data: Any) -> Source:
    """Noise of the model's size: in memory, or as JPEG files half as large again."""
    import numpy as np
    from PIL import Image

    from nextblock.data import open_source

    rng = np.random.default_rng(0)
    height, width = _size_px(config)
    if not is_jpeg:
        return _noise_source(rng.integers(0, 256, (images, config.in_chans, height, width), np.uint8))
    folder.mkdir()
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        coarse.resize((width * 3 // 2, height * 3 // 2), Image.Resampling.BICUBIC).save(
            folder / f"{number:05d}.jpg", quality=90
        )
    return open_source(str(folder), data)


def _noise_source(pixels: Any) -> Source:
    import torch

    from nextblock.data import Source

    class Noise(Source):
        spec, in_memory = "noise", True

        @property
        def has_labels(self) -> bool:
            return False

        def __len__(self) -> int:
            return len(pixels)

        def _read(self, index: int) -> Any:
            return torch.from_numpy(pixels[index])

        def _name(self, index: int) -> str:
            return f"noise[{index}]"

        def _find_labels(self) -> Any:
            raise ValueError("noise has no labels")

        def _make_fingerprint(self) -> str:
            return f"noise-{len(self)}"

    return Noise()
