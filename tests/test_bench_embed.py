"""The bench of embedding counts the flops that a flop counter counts, and reports as it promises."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextblock.bench import embed as bench_module
from nextblock.bench.embed import EmbedBench, measure_embed
from nextblock.bench.flops import encode_flops
from nextblock.cli import main
from nextblock.models import NextBlockModel
from nextblock.settings import to_dict
from toy import CONFIG, one_thread  # noqa: F401 - a fixture


def job(**changes):
    common = {"precision": "fp32", "device": "cpu", "threads": 1, "clock": "wall"}
    values = {"batch_size": 2, "images": 3, "attention": "native", "is_jpeg": False}
    return {**common, "model": to_dict(CONFIG), **values, **changes}


def test_flops_of_the_encoder_are_those_that_a_flop_counter_counts():
    model = NextBlockModel(CONFIG).eval()
    # Under this kernel attention is two matrix products, which the counter sees.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode(torch.zeros(1, 3, 16, 16), attention="full")
    assert encode_flops(CONFIG) == counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, {"is_jpeg": True}])
def test_a_variant_embeds_its_images_and_tells_its_rate(monkeypatch, changes):
    monkeypatch.setattr("nextblock.data.workers.os.sched_getaffinity", lambda process: {0}, raising=False)
    found = measure_embed(job(**changes))
    assert found["images_per_s"] > 0
    assert found["device"].startswith("cpu")


def test_the_bench_reports_its_share_first_and_every_variant(monkeypatch, capsys):
    asked = {}

    def turns(jobs, rounds):
        asked.update(jobs, rounds=rounds)
        rate = {"images_per_s": 2.0, "peak_memory_mb": 1.0, "device": "cpu", "threads": 1, "torch": "2"}
        return {
            name: [{"gflops": {"a": [50.0, 80.0, 90.0], "b": [70.0, 99.0, 60.0]}} if name == "gemm" else rate]
            for name in jobs
        }

    monkeypatch.setattr(bench_module, "take_turns", turns)
    assert main(["bench", "embed", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    gflop = told["encoder_gflop_per_image"]
    assert told["ratio"] == told["rows"][0]["ratio"] == pytest.approx(2 * gflop / 80), (
        "to the median of the best shape"
    )
    assert told["gemm_gflops_fastest"] == 99.0
    assert told["rows"][0]["at_least"] == 0.8
    assert [row["what"] for row in told["rows"][1:4]] == [
        "images in memory, native attention",
        "the same, full attention",
        "JPEG files, decoded by workers",
    ]
    assert [row["what"] for row in told["rows"][4:]] == [f"batches of {size}" for size in (4, 8, 32, 64)]
    assert {job["images"] for name, (_, job) in list(asked.items())[1:-1]} == {64}


def test_a_quick_bench_has_one_round_and_no_other_batches(monkeypatch):
    bench = EmbedBench(quick=True, batch_size=4)
    assert list(bench._jobs()) == ["gemm", "native", "full", "jpeg"]
    assert bench._jobs()["native"][1]["images"] == 4


@pytest.mark.parametrize("changes", [{"quick": True}, {"model": "xtra-tiny"}, {"precision": "bf16"}])
def test_the_budget_is_of_the_model_and_precision_that_it_was_stated_for(changes):
    runs = {"native": [{"images_per_s": 2.0}]}
    (stated, *_), (other, *_) = (
        list(bench._rows(runs, 80.0)) for bench in (EmbedBench(), EmbedBench(**changes))
    )
    assert (stated.at_least, other.at_least) == (0.8, None)


def test_under_a_clock_of_cpu_seconds_there_is_no_row_of_what_workers_decode():
    assert list(EmbedBench(quick=True, clock="cpu")._jobs()) == ["gemm", "native", "full"]


@pytest.mark.parametrize("name", ["batch_size", "images", "rounds", "threads"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; use at least 1"):
        replace(EmbedBench(), **{name: 0})
