"""What the tests of probes share: a quick probe of toy sources, which have names, by a toy model."""

import pytest

import nextblock
from nextblock.evaluate import evaluation, splits
from toy import DATA, ToySource, toy_model

QUICK = {
    "model": "RUN",
    "train": "toy-0",
    "test": "toy-1",
    "epochs": 12,
    "batch_size": 16,
    "lr": (1e-2,),
    "attentive_heads": 4,
    "baselines": False,
    "device": "cpu",
}


def known_sources():
    """toy-1 and toy-2 are other images than toy-0; of "bad" and "rotten" some cannot be read."""
    return {
        "toy-0": ToySource(96),
        "toy-1": ToySource(48, seed=1),
        "toy-2": ToySource(40, seed=2),
        "single": ToySource(4, seed=3),
        "lacking": ToySource(3, seed=4),
        "shuffled": ToySource(400, seed=5, shuffled=True),
        "shuffled-test": ToySource(400, seed=6, shuffled=True),
        "bad": ToySource(96, bad=(3, 50)),
        "rotten": ToySource(96, bad=range(0, 96, 2)),
    }


@pytest.fixture
def known(monkeypatch):
    """Sources and model are found by these names; the sources."""
    return know(monkeypatch.setattr)


def know(replace):
    """Let an evaluation find toy sources and the toy model."""
    sources = known_sources()
    replace(splits, "open_source", lambda spec, data: sources[spec])
    replace(evaluation, "open_model", lambda *_: (toy_model(), DATA))
    return sources


def run(**changes):
    return nextblock.probe(**{**QUICK, **changes})


def scores(result):
    """Everything that a probe measured."""
    names = ("encoder", "head", "lr", "layers", "top1", "top5", "loss", "calibration_error")
    grid = [tuple(map(str, (one[n] for n in names[:-1]))) for one in result.facts["grid"]]
    return [tuple(str(row[name]) for name in names) for row in result.rows], grid
