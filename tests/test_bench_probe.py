"""The bench of probes: what a longer one would gain, the budget, and what it tells."""

import json

import pytest

from nextblock.bench import probe as bench_module
from nextblock.bench.probe import ratio_of_longer
from nextblock.cli import main

FEATURES_S, HEAD_S = 20.0, 0.15


@pytest.fixture
def measured(monkeypatch):
    """Seconds of a machine on which features take 20, and ten epochs of a head 0.15."""

    def run(target, job):
        heads = [f"{head} {lr:g}" for head in job.get("heads", ()) for lr in job["lr"]]
        elapsed_s = FEATURES_S + HEAD_S * len(heads) * job["epochs"] / 10
        machine = {"device": "cpu", "threads": 1, "torch": "2"}
        top1 = dict.fromkeys(heads, 0.5)
        return {"elapsed_s": elapsed_s, "process_s": elapsed_s + 5, "top1": top1, **machine}

    monkeypatch.setattr(bench_module, "run_in_process", run)


def told(capsys, *words):
    assert main(["bench", "probe", "--json", *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return " ".join(lines), json.loads(last)


@pytest.mark.parametrize("heads", [2, 18])
@pytest.mark.parametrize("times", [1, 5, 10])
def test_a_longer_probe_is_foretold_as_it_would_be_measured(heads, times):
    def measure(epochs):
        grid_s = FEATURES_S + sum(HEAD_S * epochs for _ in range(heads))
        return grid_s, sum(FEATURES_S + HEAD_S * epochs for _ in range(heads))

    grid_s, alone_s = measure(times)
    assert ratio_of_longer(*measure(1), heads, times) == pytest.approx(alone_s / grid_s)


def test_it_tells_epochs_and_pictures_and_what_a_probe_of_usual_length_would_gain(
    measured, capsys, monkeypatch
):
    text, result = told(capsys)
    assert result["ratio"] == pytest.approx(18 * 20.15 / 22.7)
    assert result["rows"][0]["at_least"] == 8
    assert "48 pictures to train on" in text
    assert "10 epochs" in text
    assert f"about {18 * 21.5 / 47:.1f}x with 100 epochs" in text
    monkeypatch.setattr("test_bench_probe.HEAD_S", -1e-3)  # as it may seem
    text, _ = told(capsys)
    assert text.endswith("so more epochs gain less")
    for words in (("--augment", "crop"), ("--epochs", "100")):
        assert "gain less" not in told(capsys, *words)[0]


def test_the_budget_is_of_the_whole_grid_on_the_model_that_it_was_stated_for(measured, capsys):
    for words in (["--quick"], ["--model", "xtra-tiny"]):
        assert told(capsys, *words)[1]["rows"][0]["at_least"] is None
