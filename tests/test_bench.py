"""The benches compare equals, count what a flop counter counts, and report as they promise."""

import importlib
import json
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextblock.bench import BENCHES
from nextblock.bench.flops import forward_flops, step_flops
from nextblock.bench.measure import BenchError, Stopwatch, run_in_process, take_turns
from nextblock.bench.plain import PlainModel, plain_optimizer
from nextblock.bench.step import StepBench, check_losses
from nextblock.bench.variants import plain_like
from nextblock.cli import main
from nextblock.config import ModelConfig, OptimConfig
from nextblock.models import NextBlockModel
from nextblock.optim import build_optimizer

CONFIG = ModelConfig(
    image_size=(16, 24),
    patch_size=4,
    block_size=(2, 3),
    embed_dim=32,
    depth=2,
    num_heads=2,
    projection_dim=48,
    predictor_dim=24,
    predictor_depth=2,
    predictor_heads=3,
    block_mlp_dim=40,
)


def both(config=CONFIG):
    """Ours, and the plain model with a copy of its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = NextBlockModel(config)
    twin = NextBlockModel(config)
    twin.load_state_dict(ours.state_dict())
    return ours, plain_like(twin)


def images(batch=3, config=CONFIG):
    size = (
        batch,
        config.in_chans,
        *(n * px for n, px in zip(config.block_grid, config.block_px, strict=True)),
    )
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------- the plain model


def test_the_plain_model_has_our_loss_and_gradients():
    ours, plain = both()
    our_loss, plain_loss = ours(images()).loss, plain(images())
    our_loss.backward()
    plain_loss.backward()
    torch.testing.assert_close(our_loss, plain_loss)
    theirs = dict(plain.named_parameters())
    assert len(theirs) == len(dict(ours.named_parameters()))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_the_plain_optimizer_makes_our_step_fused_or_not():
    ours, plain = both()
    optim = OptimConfig()
    settings = {name: getattr(optim, name) for name in ("lr", "weight_decay", "betas", "eps")}
    unfused = plain_like(ours)
    unfused.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()}, assign=True)
    trained = [
        (ours, build_optimizer(ours, optim)),
        (plain, plain_optimizer(plain, **settings, fused=True)),
        (unfused, plain_optimizer(unfused, **settings)),
    ]
    for model, optimizer in trained:
        for _ in range(2):
            optimizer.zero_grad()
            out = model(images())
            (out if isinstance(out, torch.Tensor) else out.loss).backward()
            optimizer.step()
    for model in (plain, unfused):
        theirs = model.state_dict()
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "change",
    [
        {"num_predicted_blocks": 2},
        {"order": "random"},
        {"drop_path": 0.1},
        {"loss": "l1"},
        {"predictor": "linear"},
        {"positions": "sincos"},
        {"bias": False},
        {"patch_norm": True},
        {"prefix": True},
        {"tokenizer": "kmeans"},
        {"projection_dim": None},
        {"block_mlp_dim": None},
    ],
)
def test_the_plain_model_refuses_what_it_does_not_implement(change):
    with pytest.raises(AssertionError, match="the plain"):
        PlainModel(replace(CONFIG, **change))


def test_a_model_that_is_not_xtra_is_refused_with_its_settings():
    with pytest.raises(
        ValueError, match=r"model\.predictor 'mlp', model\.bias False, .*; use --model xtra-b16"
    ):
        _ = StepBench(model="aim-tiny").config


# ------------------------------------------------------------------------------------------------- the flops


def counted_flops(model, pixels):
    """Forward, and forward and backward, by torch's counter; it knows attention by its two products only."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(pixels).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_predicted_blocks": 2},
        {"block_size": (1, 1)},
        {"projection_dim": None},
        {"block_mlp_dim": None},
    ],
)
def test_the_flops_are_those_of_torchs_counter(change):
    config = replace(CONFIG, **change)
    forward, step = counted_flops(NextBlockModel(config), images(2, config))
    parts = forward_flops(config)
    # The model embeds the last block's patches too before it leaves them out; they are not counted as needed.
    last_block = parts["patch_embed"] // (config.num_blocks - 1)
    assert forward == 2 * (sum(parts.values()) + last_block)
    assert step == 2 * (step_flops(config) + 2 * last_block)


# -------------------------------------------------------------------------------------------- the comparison


def test_different_first_losses_give_no_ratio():
    results = {"ours": [{"losses": [1.0, 0.5]}], "plain": [{"losses": [1.0, 0.5001]}, {"losses": [1.1, 0.5]}]}
    with pytest.raises(BenchError, match=r"1\.000000 of 'ours' and 1\.100000 of 'plain'"):
        check_losses(results, ["ours", "plain"], "fp32")
    results["plain"].pop()
    assert check_losses(results, ["ours", "plain"], "fp32")["plain"] == pytest.approx(1e-4)


def test_a_loss_that_is_no_number_gives_no_ratio():
    results = {"ours": [{"losses": [1.0]}], "plain": [{"losses": [float("nan")]}]}
    with pytest.raises(BenchError, match="do not compute the same thing"):
        check_losses(results, ["ours", "plain"], "fp32")


def test_jobs_take_turns(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "nextblock.bench.measure.run_in_process", lambda target, job: seen.append((target, job["n"])) or job
    )
    results = take_turns({"a": ("x:f", {"n": 1}), "b": ("y:g", {"n": 2})}, rounds=2)
    assert seen == [("x:f", 1), ("y:g", 2)] * 2
    assert results == {"a": [{"n": 1}] * 2, "b": [{"n": 2}] * 2}


def test_a_job_is_done_in_a_process_of_its_own_and_answers_in_json():
    job = {"threads": 1, "b": [2.5, None]}
    assert run_in_process("builtins:dict", job) == job


def test_a_process_that_fails_is_told_of_with_its_reason():
    with pytest.raises(BenchError, match=r"\(builtins:no_such_function\) failed: AttributeError"):
        run_in_process("builtins:no_such_function", {})


def test_a_stopwatch_times_wrapped_calls_and_leaves_no_trace():
    class Sleeper:
        def nap(self, seconds):
            time.sleep(seconds)
            return seconds

    sleeper, watch = Sleeper(), Stopwatch()
    with watch.watch(sleeper, "nap", "naps"), watch.lap("all"):
        assert sleeper.nap(0.01) == 0.01
    sleeper.nap(0)
    assert len(watch.laps_s["naps"]) == 1
    assert 0.01 <= watch.total_s("naps") <= watch.total_s("all")
    assert "nap" not in vars(sleeper)


def test_a_timed_iterator_gives_the_same_items():
    watch = Stopwatch()
    assert list(watch.timed_iterator(range(3), "items")) == [0, 1, 2]
    assert len(watch.laps_s["items"]) == 4  # the end is asked for too


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs are done here, since starting a process takes longer than they do, and the GEMMs are small."""

    def call(target, job):
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)(json.loads(json.dumps(job)))

    monkeypatch.setattr("nextblock.bench.measure.run_in_process", call)
    monkeypatch.setattr("nextblock.bench.gemm.SQUARE", 64)
    monkeypatch.setattr("nextblock.bench.loop.WARMUP_STEPS", 1)
    monkeypatch.setattr("nextblock.bench.loop.QUICK_STEPS", 5)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_step_reports_rows_and_the_ratio_of_the_first(capsys, in_this_process):
    argv = [
        "--quick",
        "--json",
        "--model",
        "xtra-tiny",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--clock",
        "cpu",
    ]
    assert main(["bench", "step", *argv]) == 0
    told = last_line(capsys)
    assert told["bench"] == "step"
    assert told["ratio"] == told["rows"][0]["ratio"] > 0
    assert [row["at_least"] for row in told["rows"] if row["at_least"] is not None] == [1.25, 1.25, 0.75, 1.0]
    assert told["threads"] == torch.get_num_threads()
    assert told["torch"] == torch.__version__
    assert told["gemm_gflops"] > 0
    assert max(told["loss_differences"].values()) < 1e-4
    assert {len(laps) for runs in told["laps_s"].values() for laps in runs.values()} == {2}


def test_loop_reports_its_own_cost_and_the_loaders_apart(capsys, in_this_process):
    assert main(["bench", "loop", "--quick", "--json"]) == 0
    told = last_line(capsys)
    assert told["steps"] == 5
    assert told["rows"][0]["at_most"] == 2.0
    assert told["ratio"] == told["rows"][0]["ratio"] > 0
    own, mean, data, whole = (row["ours"] for row in told["rows"])
    assert min(own, mean, data) > 0
    assert whole > told["compute_ms"]


def test_every_bench_is_listed_and_can_be_made():
    for name in BENCHES:
        assert main(["bench", name, "--help"]) == 0
    assert main(["bench"]) == 0


def test_an_unknown_bench_is_refused_with_the_nearest(capsys):
    assert main(["bench", "stpe"]) == 2
    assert "did you mean 'step'?" in capsys.readouterr().err


def test_settings_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="steps is 0; use at least 1"):
        StepBench(steps=0)
    with pytest.raises(ValueError, match="unknown preset"):
        _ = StepBench(model="xtra-b17").config


def test_the_large_blocks_are_twice_as_wide_and_high():
    sizes = [StepBench().config, StepBench().large_blocks]
    assert [c.num_blocks for c in sizes] == [16, 4]
    assert all(a.num_patches == b.num_patches for a, b in pairwise(sizes))
