"""`nextblock plan`: estimate a training's memory, speed and length before requesting GPUs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from nextblock.cli.arguments import Parser, parse_run
from nextblock.cli.output import end_with_json, print_table, say
from nextblock.config import RunConfig
from nextblock.logs import counted
from nextblock.plan import GPUS, RESERVE, Gpu, plan
from nextblock.presets import DEFAULT_PRESET, PRESETS
from nextblock.settings import Count, Positive, Rule, describe_type, require

KNOWN_IMAGES = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 13_100_000}
"""Images in the data sets of presets; ImageNet-21k as prepared by XTRA's authors."""


def run(argv: Sequence[str]) -> int:
    """Print parameters, arithmetic, length, memory, speed, and all assumptions."""
    share = Annotated[float, Rule(lambda x: 0 < x <= 1, "above 0 and up to 1")]
    parser = Parser("plan")
    add = parser.add_argument
    known: Any = Literal[*GPUS]
    add("--gpu", type=known | None, help="GPU model; for others give --gpu_memory_gb and --gpu_tflops")
    add("--gpus", type=Count, default=1, help="number of GPUs (default: 1)")
    add("--gpus_per_node", type=Count, default=8, help="GPUs per machine (default: 8)")
    add("--gpu_memory_gb", type=Positive | None, help="memory per GPU in GB")
    add("--gpu_tflops", type=Positive | None, help="dense peak per GPU in the run's precision, in TFLOP/s")
    add("--mfu", type=share, default=0.4, help="share of the peak reached (default: 0.4)")
    add("--images", type=Count | None, help="number of training images")
    config, options = parse_run(parser, argv)
    memory_gb, tflops = options.gpu_memory_gb, options.gpu_tflops
    is_known = options.gpu is not None or None not in (memory_gb, tflops)
    require(is_known, f"--gpu must be given: {describe_type(known)}; or --gpu_memory_gb and --gpu_tflops")
    gpu = GPUS.get(str(options.gpu), Gpu(0, 0, 0, "", ""))
    peak = {} if tflops is None else {"tflops": tflops, "fp32_tflops": tflops, "source": "--gpu_tflops"}
    gpu = replace(gpu, memory_gb=memory_gb or gpu.memory_gb, **peak)
    preset, images = config.preset or DEFAULT_PRESET, options.images
    if images is None and config.data.train_specs:
        from nextblock.data import open_sources

        images = len(open_sources(config.data.train_specs, config.data))
    images = images or KNOWN_IMAGES.get(PRESETS[preset].images)
    planned = plan(config, gpu, options.gpus, mfu=options.mfu, images=images)
    if options.json:
        given = {"gpus": options.gpus, "mfu": options.mfu, "images": images}
        end_with_json({"preset": preset, "gpu": vars(gpu)} | given | planned)
        return 0
    what = f"{options.gpus} x {options.gpu or 'GPU'} of {gpu.memory_gb:g} GB"
    batch = f"{counted(planned['batch_size'], 'image')} per step, {planned['images_per_gpu']:,} per GPU"
    say(*textwrap.wrap(f"{preset} on {what}: {batch}", 79), "")
    for name, text in _facts(config, planned):
        say(*textwrap.wrap(text, 79, initial_indent=f"{name:<12}", subsequent_indent=" " * 12))
    ways = ["1 GPU"] if options.gpus == 1 else ["DDP", "FSDP2"]
    per_node = min(options.gpus, options.gpus_per_node)
    print_table(
        ["", *(f"{way}{again}" for way in ways for again in ("", ",\nrecompute"))],
        [(name, *(v.rjust(6) for v in values)) for name, *values in _rows(planned, options.gpus, per_node)],
        title="GB per GPU, and speed",
        below="recompute: with --train.activation_checkpointing true\n"
        "largest micro-batch: the most images that fit in one forward pass on a GPU",
    )
    say("", "Assumed:")
    for text in _assumptions(config, planned, gpu, options.mfu):
        say(*textwrap.wrap(text, 79, initial_indent="- ", subsequent_indent="  "))
    return 0


def _facts(config: RunConfig, planned: dict[str, Any]) -> Iterator[tuple[str, str]]:
    names = ("encoder", "predictor", "trained")
    encoder, predictor, trained = (f"{planned['parameters'][name] / 1e6:,.1f} M" for name in names)
    yield "parameters", f"encoder {encoder}, predictor {predictor}, together {trained}"
    forward = planned["forward_flops"]
    whole = sum(forward.values())
    parts = ", ".join(f"{name} {flop / whole:.0%}" for name, flop in forward.items() if flop >= whole / 200)
    flops = (whole, planned["step_flops"], planned["step_flops_recomputed"])
    once, step, again = (f"{flop / 1e9:,.1f}" for flop in flops)
    work = f"{once} GFLOP per image forward ({parts}); {step} with the backward pass"
    yield "arithmetic", f"{work}, {again} if layers are recomputed"
    length = f"{config.train.duration}; steps depend on the images: give --images N or --data.train DIR"
    if planned["steps"] is not None:
        length = f"{counted(planned['steps'], 'step')}, {counted(planned['samples'], 'sample')}"
        length += "" if planned["epochs"] is None else f", {counted(planned['epochs'], 'epoch')}"
    yield "length", length
    model, optimizer = (planned[f"{name}_bytes"] / 1e9 for name in ("model", "optimizer"))
    kept = config.checkpoint.keep
    size = f"{model + optimizer:.3g} GB (model {model:.3g}, optimizer {optimizer:.3g})"
    yield "checkpoint", f"{size}; the latest {kept} take {kept * (model + optimizer):.3g} GB"


def _rows(planned: dict[str, Any], gpus: int, per_node: int) -> Iterator[list[str]]:
    ways = planned["layouts"]
    digits = 1 if ways[0]["total"] >= 1e9 else 3
    sizes = {
        "weights, fp32": "weights",
        "weights, 16-bit copies": "copies",
        "gradients, fp32": "gradients",
        "AdamW's moments, fp32": "moments",
        "exchange between GPUs": "exchange",
        f"activations, {counted(planned['micro_batch'], 'image')}": "activations",
        "total": "total",
    }
    for name, key in sizes.items():
        if any(way[key] for way in ways):
            yield [name, *(f"{way[key] / 1e9:.{digits}f}" for way in ways)]
    largest = [way["largest_micro_batch"] for way in ways]
    yield ["largest micro-batch", *(f"{images:,}" if images else "none" for images in largest)]
    # No speed is shown for a layout that does not fit.
    rates = [way["images_per_s"] if way["largest_micro_batch"] else None for way in ways]
    shares = {"images/s": 1.0}
    if gpus > 1:
        shares |= {"images/s per GPU": 1 / gpus, "images/s per node": per_node / gpus}
    for name, share in shares.items():
        yield [name, *("-" if rate is None else f"{rate * share:,.0f}" for rate in rates)]
    if (samples := planned["samples"]) is not None:
        yield ["days", *("-" if rate is None else f"{samples / rate / 86400:,.3g}" for rate in rates)]


def _assumptions(config: RunConfig, planned: dict[str, Any], gpu: Gpu, mfu: float) -> Iterator[str]:
    precision, is_fp32 = planned["precision"], planned["precision"] == "fp32"
    yield (
        f"{mfu:.0%} of the peak is reached (--mfu), counting recomputed work; exchange between GPUs and "
        "decoding take no further time"
    )
    yield f"peak: {gpu.fp32_tflops if is_fp32 else gpu.tflops:g} TFLOP/s in {precision} ({gpu.source})"
    if config.train.predictor_fp32 and not is_fp32:
        yield f"train.predictor_fp32: the predictor's layers have a peak of {gpu.fp32_tflops:g} TFLOP/s"
    yield "work: matrix products; attention counts all pairs of tokens, including masked ones"
    yield (
        f"memory: {RESERVE:.0%} is left free; all parts peak at once; attention runs in a fused kernel; "
        "FSDP2 wraps each layer, shards over all GPUs, and cannot shard autocast's copies"
    )
    if config.model.prefix:
        yield "prefixes have their mean length"
    if config.model.teacher is not None:
        yield "the teacher's forward pass and memory are not included"
    yield "nothing here was measured on a GPU"
