"""Run every GPU test and benchmark in at most 8 minutes, and write gpu-check.json: see docs/guides/gpu.md.

    python benchmarks/gpu_check.py                        # on a machine with a CUDA GPU; or: make gpu-check
    python benchmarks/gpu_check.py --device cpu --quick   # tiny sizes: a check of this script, no benchmark

Each part runs in a process of its own, which writes a line as soon as it knows something. A part that fails,
hangs or runs out of time loses only what it had not measured yet.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

LIMITS_S = {
    "machine": 25.0,
    "tests": 160.0,
    "step b16": 75.0,
    "step h14": 110.0,
    "data": 25.0,
    "embed": 35.0,
    "probe": 40.0,
}
"""Seconds of each part; what one leaves over, the next ones have."""
MODELS = {"b16": ("xtra-b16", {"image_size": 256}), "h14": ("xtra-h14", {"image_size": 224})}
TINY = {
    **{"image_size": 32, "patch_size": 8, "block_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},
    **{"projection_dim": 32, "predictor_dim": 32, "predictor_depth": 1, "predictor_heads": 2},
    **{"block_mlp_dim": 32},
}
BATCHES, TINY_BATCHES = (512, 256, 128, 64, 32, 16, 8, 4), (8, 4)
VARIANTS = ((False, False), (True, False), (False, True), (True, True))
"""Of a training step: compiled or not, activations recomputed or not."""
WARMUP, MEASURED, MEASURED_S = 3, 20, 6.0
"""Steps that are not counted; at most so many steps, and about so many seconds, that are."""

Emit = Callable[..., None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What every part needs to know."""

    device: str
    quick: bool


# ------------------------------------------------------------------------------------------------- the parts


def describe_machine(options: Options, emit: Emit) -> None:
    """Card, driver and versions; what cannot be found is null."""
    import torch

    names = ("card", "driver", "memory", "power_limit", "gpus", "compute_capability", "cudnn")
    found: Result = dict.fromkeys(names)
    found |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "cores": os.cpu_count()}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    if options.device == "cuda" and torch.cuda.is_available():
        fields = "driver_version,memory.total,power.limit"
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
            printed = subprocess.run(
                ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
                capture_output=True, text=True, check=True, timeout=15,
            ).stdout  # fmt: skip
            values = [value.strip() for value in printed.splitlines()[0].split(",")]
            found |= zip(("driver", "memory", "power_limit"), values, strict=True)
        found |= {"card": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
        capability = torch.cuda.get_device_capability()
        found |= {"compute_capability": capability, "cudnn": torch.backends.cudnn.version()}
    emit("machine", **found)


def run_tests(options: Options, emit: Emit) -> None:
    """Run tests/gpu; a line for each test before it starts, and one when it ends."""
    import pytest

    class Recorder:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            for item in session.items:
                emit("test", name=item.nodeid, outcome="not run")

        def pytest_runtest_logstart(self, nodeid: str) -> None:
            emit("test", name=nodeid, outcome="not finished")

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            # A test counts once: its own phase, or the first one that did not go well.
            if report.when == "call" or report.outcome != "passed":
                why = str(report.longrepr or "").splitlines()[-1:] if report.failed else []
                emit("test", name=report.nodeid, outcome=report.outcome, seconds=report.duration, why=why)

    os.environ["GPU_TESTS_DEVICE"] = options.device
    few = ["-k", "fused or tables or waits"] if options.quick else []
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *few, "tests/gpu"], plugins=[Recorder()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


def measure_steps(options: Options, emit: Emit, model: str) -> None:
    """Rates of matrix products, of the encoder, and of training steps in bf16, with peak memory."""
    import torch

    from common import gemm_gflops
    from nextblock import plan
    from nextblock.presets import model_config
    from nextblock.train.runtime import process_settings
    from nextblock.train.trainer import Trainer
    from step import LEARNING_RATE, PLAINLY, noise, run_config, step_of

    name, changes = MODELS[model]
    config = model_config(name, **PLAINLY, **(TINY if options.quick else changes))
    run = run_config(config, batch_size=1, precision="bf16", device=options.device)
    # The whole encoder of all patches, also those of the last block.
    encoder = plan.stacks(config)[0]._replace(tokens=config.num_patches)
    encode_flops = plan.forward_flops(config)["patch_embed"] + encoder.depth * encoder.flops
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    peak = plan.peak_tflops(torch.cuda.get_device_name()) if is_cuda else None
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))

    def synchronize() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    def time_calls(call: Callable[[int], object]) -> float:
        """Seconds of a call: of all of them together, as a GPU works on while Python prepares the next."""
        for index in range(WARMUP):
            call(index)
        synchronize()
        started_s, calls = time.perf_counter(), 0
        limit_s = 0.2 if options.quick else MEASURED_S
        while calls < MEASURED and (calls < 2 or time.perf_counter() - started_s < limit_s):
            call(WARMUP + calls)
            calls += 1
        synchronize()
        return (time.perf_counter() - started_s) / calls

    def report(what: str, images: int, seconds: float, flops: float, **more: Any) -> None:
        per_s = images / seconds
        tflops = per_s * flops / 1e12
        emit(
            what,
            batch=images,
            images_per_s=per_s,
            tflops=tflops,
            mfu=tflops / peak if peak else None,
            of_gemm=tflops / gemm if gemm else None,
            peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None,
            **more,
        )

    def batches(recompute: bool) -> Iterator[int]:
        """The sizes that should fit by the plan's count, the largest first."""
        free = 0.9 * torch.cuda.get_device_properties(device).total_memory if is_cuda else float("inf")
        needs = plan.memory(run, "bf16", 1, sharded=False, recompute=recompute)
        fixed = sum(needs.values()) - needs["image"]
        for batch in TINY_BATCHES if options.quick else BATCHES:
            if fixed + batch * needs["image"] <= free:
                yield batch

    def largest(measure: Callable[[int], object], sizes: Iterator[int]) -> None:
        """Measure at the largest size that runs."""
        for batch in sizes:
            trainer.optimizer.zero_grad(set_to_none=True)  # of one that did not fit
            gc.collect()
            if is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                measure(batch)
            except torch.OutOfMemoryError:
                continue
            return
        raise RuntimeError("not even the smallest batch fits into memory")

    def pinned(batch: int) -> torch.Tensor:
        """Images as the loader gives them: a pinned batch is copied while the GPU computes."""
        return noise(config, batch).pin_memory() if is_cuda else noise(config, batch)

    tokens, hidden = 64 * config.num_patches, int(config.embed_dim * config.mlp_ratio)
    shapes = [(tokens, config.embed_dim, hidden), (tokens, hidden, config.embed_dim)]
    gemm = None
    if not options.quick:  # the large square takes long on a CPU
        gemm = gemm_gflops([*shapes, (4096, 4096, 4096)], device, torch.bfloat16, 0.2) / 1000
        emit("gemm", tflops=gemm, peak_tflops=peak)

    with process_settings(device):
        trainer = Trainer(run, device, None)

        def encode(batch: int) -> None:
            images = trainer.to_model(pinned(batch))
            with trainer.evaluating() as network:
                report("encode", batch, time_calls(lambda _: network.encode(images).tokens), encode_flops)

        def train(batch: int, *, compiled: bool, recompute: bool) -> None:
            images, losses = pinned(batch), []
            started_s = time.perf_counter()

            def step(index: int) -> None:
                losses.append(trainer.train_step(step_of(index, images), LEARNING_RATE).loss)
                if index == 0:
                    synchronize()
                    firsts.append(time.perf_counter() - started_s)

            firsts: list[float] = []
            seconds = time_calls(step)
            report(
                "step",
                batch,
                seconds,
                plan.step_flops(config),
                compiled=compiled,
                recompute=recompute,
                first_step_s=firsts[0],
                losses=[losses[0], losses[-1]],
            )

        largest(encode, iter(TINY_BATCHES if options.quick else BATCHES[1:]))
        for compiled, recompute in VARIANTS[::2] if options.quick else VARIANTS:
            trainer.model.set_grad_checkpointing(recompute)
            torch.compiler.reset()
            trainer._forward = torch.compile(trainer.model) if compiled else trainer.model  # type: ignore[assignment]
            try:
                largest(partial(train, compiled=compiled, recompute=recompute), batches(recompute))
            except Exception as error:  # the other variants may run
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                emit("step", compiled=compiled, recompute=recompute, failed=what)


def measure_data(options: Options, emit: Emit) -> None:
    """Training crops per second on one core, from JPEG files, with each decoder that makes exact pixels."""
    import torch

    from data import PHOTOS, SIZES, time_crops, write_photos
    from nextblock.data import jpeg_decoder

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), SIZES)
        for image_size in (256, 224):
            laps_s = time_crops(Path(folder), SIZES, "auto", image_size, 2 if options.quick else 8)
            for size in SIZES:
                what = {"crop_px": image_size, "files_px": size, "decoder": jpeg_decoder("auto")}
                emit("data", images_per_s_per_core=PHOTOS / median(laps_s[size]), **what)
            if options.quick:
                return


def measure_embedding(options: Options, emit: Emit) -> None:
    """All that `nextblock embed` does for an image: decode, crop, encode in bf16, write to a file."""
    import torch
    from PIL import Image

    import nextblock
    from common import peak_memory_mb
    from nextblock.checkpoint import save_model
    from nextblock.presets import model_config
    from step import noise

    # The start (reading the model, hashing it, starting workers) takes as long with few images as with many,
    # so what more images take is the rate.
    few, many, batch = (8, 24, 8) if options.quick else (256, 2304, 256)
    for name, changes in MODELS.values():
        config = model_config(
            name, predictor=None, drop_path=0.0, init=None, **(TINY if options.quick else changes)
        )
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            save_model(root / "encoder.safetensors", nextblock.NextBlockModel(config))
            photos = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in noise(config, 64)]
            for number in (few, few, many):  # the first is a warm-up
                images = root / str(len(seconds))
                images.mkdir()
                for index in range(number):
                    photos[index % len(photos)].save(images / f"{index:05d}.jpg", quality=90)
                started_s = time.perf_counter()
                nextblock.embed(
                    model=str(root / "encoder.safetensors"),
                    data=str(images),
                    out=str(root / f"{len(seconds)}.npz"),
                    encode_batch_size=batch,
                    precision="bf16",
                    device=options.device,
                )
                seconds.append(time.perf_counter() - started_s)
        per_s = (many - few) / (seconds[2] - seconds[1])
        emit(
            "embed",
            model=name,
            images_per_s=per_s,
            peak_memory_mb=peak_memory_mb(torch.device(options.device)),
        )
        if options.quick:
            return


def measure_probe(options: Options, emit: Emit) -> None:
    """Seconds of probing 18 heads in one run, and of a single head; the first run counts nowhere."""
    from probe import HEADS, RATES, prepare, probe

    for model in ("xtra-small-64",) if options.quick else ("xtra-b16", "xtra-h14"):
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), model)
            epochs, rates = (2, RATES[::8]) if options.quick else (10, RATES)
            probe(Path(folder), HEADS[1:], RATES[:1], epochs)
            alone_s = probe(Path(folder), HEADS[1:], RATES[:1], epochs)["elapsed_s"]
            grid = probe(Path(folder), HEADS, rates, epochs)
            emit("probe", model=model, heads=len(grid["top1"]), grid_s=grid["elapsed_s"], one_head_s=alone_s)


PARTS: dict[str, Callable[[Options, Emit], None]] = {
    "machine": describe_machine,
    "tests": run_tests,
    "step b16": partial(measure_steps, model="b16"),
    "step h14": partial(measure_steps, model="h14"),
    "data": measure_data,
    "embed": measure_embedding,
    "probe": measure_probe,
}


# ------------------------------------------------------------------------------------ running, and the report


def run_part(name: str, options: Options, limit_s: float, folder: Path) -> Result:
    """Run a part in a process of its own; what it found, and how it ended."""
    lines, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    lines.touch()
    command = [sys.executable, __file__, "--part", name, "--lines", lines, "--device", options.device]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    started_s = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), *["--quick"] * options.quick],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(1.0, limit_s))
            status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
        finally:
            # Its session ends with it: ranks of tests, workers of loaders and compilers too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = []
    for line in lines.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last one may be cut
            found.append(json.loads(line))
    tail = [] if status == "done" else log.read_text(errors="replace").splitlines()[-30:]
    seconds = time.monotonic() - started_s
    return {"status": status, "seconds": seconds, "limit_s": limit_s, "found": found, "log": tail}


def outcomes(found: list[Result]) -> dict[str, Result]:
    """The last that was said of each test."""
    return {
        one["name"]: {key: value for key, value in one.items() if key not in ("what", "name")}
        for one in found
        if one["what"] == "test"
    }


def table(result: Result) -> Iterator[str]:
    """What a reader wants to know first."""
    about = result["machine"]
    yield f"{about.get('card') or 'CPU'}, driver {about.get('driver')}, torch {about.get('torch')}"
    ends = [test["outcome"] for test in result["tests"].values()]
    yield "tests: " + (", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends))) or "none ran")
    for name, test in result["tests"].items():
        if test["outcome"] not in ("passed", "skipped"):
            yield f"  {test['outcome']}: {name} {' '.join(test.get('why', []))}"
    yield f"{'':34}{'batch':>6}{'images/s':>10}{'MFU':>7}{'of GEMM':>9}{'peak GB':>9}"
    for name, part in result["parts"].items():
        for one in part["found"]:
            label = f"{name}, {one['what']}" if name.startswith("step") else one["what"]
            if one["what"] == "step":
                label = name + ", compiled" * one["compiled"] + ", recomputed" * one["recompute"]
            if "failed" in one:
                yield f"{label:34}failed: {one['failed']}"
            elif "mfu" in one:
                mfu, of_gemm = (f"{one[key]:.1%}" if one[key] else "-" for key in ("mfu", "of_gemm"))
                memory = f"{one['peak_memory_gb']:.1f}" if one["peak_memory_gb"] else "-"
                rate = f"{one['images_per_s']:,.1f}"
                yield f"{label:34}{one['batch']:>6}{rate:>10}{mfu:>7}{of_gemm:>9}{memory:>9}"
            elif one["what"] != "test":
                shown = {
                    key: f"{value:.4g}" if isinstance(value, float) else value for key, value in one.items()
                }
                yield f"{label:34}" + ", ".join(f"{k} {v}" for k, v in shown.items() if k != "what")
        if part["status"] != "done":
            yield f"{name}: {part['status']}; " + (part["log"] or ["no output"])[-1]


def main() -> int:
    """Run all parts and write what they found after each; 0 if all ended well and no test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check of this script")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--limit", type=float, default=470.0, help="seconds in all")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = Options(given.device, given.quick)
    if given.part is not None:
        with given.lines.open("a") as file:

            def emit(what: str, **values: Any) -> None:
                file.write(json.dumps({"what": what, **values}) + "\n")
                file.flush()

            PARTS[given.part](options, emit)
        return 0

    started_s = time.monotonic()
    result: Result = {"quick": options.quick, "time": time.strftime("%F %T %z")}
    result |= {"machine": {}, "tests": {}, "parts": {}}
    share = given.limit / sum(LIMITS_S.values())
    due_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in PARTS:
            # A part may use what those before it left over, and never what belongs to those after it.
            due_s += share * LIMITS_S[name]
            limit_s = due_s - (time.monotonic() - started_s)
            sys.stdout.write(f"{name}, at most {limit_s:.0f} s ...\n")
            sys.stdout.flush()
            part = run_part(name, options, limit_s, Path(folder))
            if name == "machine" and part["found"]:
                result["machine"] = part["found"].pop()
                if options.device == "cuda" and not result["machine"]["gpus"]:
                    sys.stderr.write(
                        f"torch {result['machine']['torch']} finds no CUDA GPU; to check this script alone: "
                        "benchmarks/gpu_check.py --device cpu --quick\n"
                    )
                    return 2
            result["tests"] |= outcomes(part["found"])
            part["found"] = [one for one in part["found"] if one["what"] != "test"]
            result["parts"][name] = part
            result["seconds"] = time.monotonic() - started_s
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n" + "\n".join(table(result)) + f"\n\n{result['seconds']:.0f} s; {given.out}\n")
    is_well = all(part["status"] == "done" for part in result["parts"].values())
    return int(not is_well or any(test["outcome"] == "failed" for test in result["tests"].values()))


if __name__ == "__main__":
    sys.exit(main())
