"""What only a GPU can show: 16-bit training, fused attention, NCCL, memory, waiting. See `make gpu-check`.

With GPU_TESTS_DEVICE=cpu the tests that need no CUDA library run on the CPU: a check of the tests themselves.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextblock.data import Source, TrainLoader
from nextblock.launch import find_world
from nextblock.models import NextBlockModel
from nextblock.plan import memory
from nextblock.train import train
from nextblock.train.distributed import find_device, process_group
from nextblock.train.runtime import autocast, choose_device, is_native
from nextblock.train.trainer import Trainer
from ranks import RankFailed, run_ranks
from tiny_runs import (
    ALL_RANDOM,
    Quiet,
    SignalAt,
    assert_same_end,
    loss_lines,
    metrics,
    run_toy,
    same,
    settings,
    weights,
)
from toy import ToySource, tiny_config, tiny_images, tiny_model

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
HAS_CUDA = torch.cuda.is_available()
GPUS = torch.cuda.device_count() if HAS_CUDA else 0

if HAS_CUDA:
    # torch asks for this before its first matrix product in a process, and never again.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not HAS_CUDA, reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("default"),  # such as that TF32 is off
]
needs_two = pytest.mark.skipif(DEVICE == "cuda" and GPUS < 2, reason="needs two CUDA GPUs")
needs_cuda = pytest.mark.skipif(not HAS_CUDA or DEVICE != "cuda", reason="needs a CUDA GPU")

ON_GPU = {"train.device": DEVICE}
EXACT = {**ON_GPU, "train.deterministic": True}

# Large enough for the kernels of real models: heads of 64, 60 tokens under the mask.
SIZES = {"image_size": 64, "patch_size": 8, "embed_dim": 128, "num_heads": 2, "predictor_dim": 64}
REAL_HEADS = {f"model.{name}": value for name, value in {**SIZES, "predictor_heads": 1}.items()}
REAL_HEADS["data.val_resize_px"] = 64


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_cuda)])
def test_bf16_training_lowers_the_loss(tmp_path, compiled):
    changes = {"train.precision": "bf16", "train.duration": "60st", "optim.lr": 3e-3}
    changes |= {**ON_GPU, **REAL_HEADS, "train.compile": compiled}
    source = ToySource(40)
    source.images = source.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    run_toy(tmp_path / "run", changes, sources={"train": source})
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


@needs_cuda
def test_an_fp16_scale_that_is_too_large_backs_off_and_the_loss_is_logged_meanwhile(tmp_path, monkeypatch):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr("nextblock.train.trainer.torch.amp.GradScaler", scaler)
    run_toy(tmp_path / "run", {**ON_GPU, "train.precision": "fp16", "train.duration": "40st"})
    lines = metrics(tmp_path / "run")
    assert lines[0]["skipped"] == 1
    assert all(line["loss"] is not None for line in lines)
    assert all((line["grad_norm"] is None) == (line["skipped"] == 1) for line in lines)
    assert not any(line["skipped"] for line in lines[-10:])
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000040" / "state.json").read_text())
    assert 1 <= state["scaler"]["scale"] < 2**30


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2), pytest.param("fp16", 1e-2, marks=needs_cuda)]
)
def test_fused_attention_under_the_block_mask_is_that_of_fp32_on_a_cpu(precision, tolerance):
    if DEVICE == "cuda" and not is_native(precision, torch.device("cuda")):
        pytest.skip(f"this GPU does not compute in {precision}")
    model = NextBlockModel(settings(REAL_HEADS).model)
    images = tiny_images(4, (64, 64))
    theirs = copy.deepcopy(model).to(DEVICE)
    # Without the kernel that writes out all scores: an error if no fused one takes the mask.
    fused = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    reference = model(images)
    reference.loss.backward()
    with sdpa_kernel(fused if DEVICE == "cuda" else [SDPBackend.MATH]):
        with autocast(torch.device(DEVICE), precision):
            found = theirs(images.to(DEVICE))
        found.loss.backward()
    assert relative(found.predictions, reference.predictions) < tolerance
    for layer in (0, len(model.encoder.blocks) - 1):
        name = f"encoder.blocks.{layer}.attn.qkv.weight"
        its, mine = (one.get_parameter(name).grad for one in (theirs, model))
        assert relative(its, mine) < 3 * tolerance


@needs_cuda
def test_a_prefix_of_each_image_gives_the_masked_attention_of_a_cpu():
    model, images = tiny_model(prefix=True), tiny_images(3)
    lengths = torch.tensor([1, 2, 4])
    reference = model(images, None, lengths)
    found = copy.deepcopy(model).cuda()(images.cuda(), None, lengths)
    assert relative(found.predictions, reference.predictions) < 1e-4


def relative(found: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    assert found is not None
    assert reference is not None
    return ((found.cpu().float() - reference).norm() / reference.norm()).item()


@needs_cuda  # on a CPU, test_train_exact.py has it
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    run_toy(tmp_path / "plain", ON_GPU)
    run_toy(tmp_path / "compiled", {**ON_GPU, "train.compile": True})
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=needs_cuda)])
def test_a_deterministic_run_resumes_bit_for_bit(tmp_path, precision):
    changes = {**EXACT, **ALL_RANDOM, "train.precision": precision}
    run_toy(tmp_path / "whole", changes)
    run_toy(tmp_path / "stopped", changes, stop=3)
    assert not (tmp_path / "stopped" / "checkpoints" / "step_00000007").exists()
    run_toy(tmp_path / "stopped", changes)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def train_rank(out: Path, changes: dict[str, Any], stop: int | None = None) -> int:
    """Train as one rank of however many the environment says; the step at the end."""
    config, world = settings(changes), find_world()
    device = find_device(choose_device(config.train.device), world)
    monitors = [] if stop is None else [SignalAt(stop, signal.SIGINT)]
    with process_group(world, device, needed=config.train.strategy == "fsdp") as group:
        sources: dict[str, Source] = {"train": ToySource(40)}
        return train(config, out, sources, monitors=monitors, reporter=Quiet(), group=group).step


def run_world(world: int, *arguments: Any) -> None:
    results = run_ranks(world, train_rank, *arguments, timeout=120)
    assert not any(isinstance(result, RankFailed) or result < 0 for result in results), results


@pytest.mark.parametrize(
    ("world", "strategy"),
    [(1, "fsdp"), *(pytest.param(2, strategy, marks=needs_two) for strategy in ("ddp", "fsdp"))],
)
def test_several_gpus_or_fsdp_are_the_plain_run_resume_bit_for_bit_and_load_into_a_plain_one(
    tmp_path, world, strategy
):
    changes = {**EXACT, "train.strategy": strategy}
    run_toy(tmp_path / "plain", EXACT)
    run_world(world, tmp_path / "whole", changes)
    run_world(world, tmp_path / "stopped", changes, 3)
    shutil.copytree(tmp_path / "stopped", tmp_path / "changed")
    run_world(world, tmp_path / "stopped", changes)
    assert same(weights(tmp_path / "stopped", 7), weights(tmp_path / "whole", 7))
    assert loss_lines(tmp_path / "stopped") == loss_lines(tmp_path / "whole")
    run_toy(tmp_path / "changed", EXACT)
    for run in ("whole", "changed"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model.prefix": True}, {"model.drop_path": 0.3, "model.order": "random"}],
    ids=["plain", "prefix", "random"],
)
def test_a_step_waits_for_the_gpu_twice_for_its_loss_and_for_its_gradient_norm(changes, monkeypatch):
    config = settings({**ON_GPU, "train.precision": "bf16", "train.micro_batch_size": 4, **changes})
    device = torch.device(DEVICE)
    trainer = Trainer(config, device, None)
    sizes = {"image_size": config.model.image_size, "batch_size": 8, "micro_batch_size": 4, "seed": 0}
    draws = 2 * config.model.depth if config.model.drop_path else 0
    pinned = {"pin_memory": DEVICE == "cuda", "drop_path_draws": draws}
    loader = TrainLoader(ToySource(40), config.data, **sizes, **pinned)
    steps, waits, item = iter(loader), [], torch.Tensor.item

    def counted(tensor: torch.Tensor) -> Any:
        if tensor.device.type != DEVICE:
            return item(tensor)
        waits.append(1)
        with sync_errors(False):
            return item(tensor)

    for _ in range(3):  # tables, moments and workspaces are made in the first steps
        trainer.train_step(next(steps), 1e-3)
    step = next(steps)
    step = step._replace(micro_batches=iter(list(step.micro_batches)))
    monkeypatch.setattr(torch.Tensor, "item", counted)
    with sync_errors(True):
        trainer.train_step(step, 1e-3)
    assert len(waits) == 2


@contextmanager
def sync_errors(raised: bool) -> Iterator[None]:
    """Let torch raise where it would wait for the GPU, or not."""
    if DEVICE == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error" if raised else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_cuda
@pytest.mark.parametrize(
    ("share", "recompute"),
    [(1.0, False), (0.1, False), (0.1, True)],
    ids=["whole", "tenth", "tenth, recomputed"],
)
def test_auto_micro_batch_runs_and_four_times_as_many_images_do_not(share, recompute):
    # In a tenth of the memory, which the count does not know of: then trying and halving must find it.
    large = {"image_size": 224, "patch_size": 16, "embed_dim": 768, "num_heads": 12, "depth": 12}
    changes = {**ON_GPU, "data.val_resize_px": 224, "train.precision": "bf16"}
    changes |= {f"model.{name}": value for name, value in large.items()}
    config = settings({**changes, "train.activation_checkpointing": recompute})
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        trainer = Trainer(config, torch.device("cuda"), None)
        images = trainer.largest_micro_batch(10**6)
        assert trainer.fits(images)
        assert not trainer.fits(4 * images)
        assert trainer.fits(images), "a failed try leaves memory behind"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_cuda
def test_peak_memory_of_a_step_is_about_what_plan_counts():
    config = settings({**ON_GPU, **REAL_HEADS, "model.depth": 8, "train.precision": "bf16"})
    trainer = Trainer(config, torch.device("cuda"), None)
    peaks = []
    for images in (256, 512):
        torch.cuda.reset_peak_memory_stats()
        trainer._zero_loss(trainer.model, images).backward()
        trainer.optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    counted = 256 * memory(config, "bf16", 1, sharded=False, recompute=False)["image"]
    assert counted == pytest.approx(peaks[1] - peaks[0], rel=0.5)


def test_a_model_moved_to_the_gpu_holds_its_tables_there():
    model = NextBlockModel(tiny_config()).to(DEVICE)
    assert model.mask is not None
    assert {one.device.type for one in (*model.state_dict().values(), model.mask)} == {DEVICE}
