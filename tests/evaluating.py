"""What tests of evaluations share: a saved toy model, toy sources under their names, a table of features."""

import json

import pytest
import torch

import nextblock
from nextblock.checkpoint import save_model
from nextblock.data import open_source
from nextblock.evaluate.features import encoder_extract
from nextblock.evaluate.table import FeatureTable
from nextblock.models.heads import FeatureConfig
from nextblock.train.distributed import ALONE
from toy import DATA, ToySource, toy_model

CPU = torch.device("cpu")
MEAN_PATCH = FeatureConfig(layers=(1,), norm_layers=True)
EVERY_TOKEN = FeatureConfig(layers=(0,), norm_layers=True, pooled=False)
OPENERS = ("splits", "embed", "search", "classify")


def toy_extract(*wanted):
    """Features of the toy model, by default the mean patch of its last layer."""
    return encoder_extract(toy_model(), wanted or [MEAN_PATCH])


def toy_table(source, extract=None, *, directory=None, group=ALONE, data=DATA, batch_size=4, keys=({},)):
    return FeatureTable(
        extract or toy_extract(),
        source,
        data,
        16,
        batch_size=batch_size,
        device=CPU,
        group=group,
        directory=directory,
        keys=keys,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(verb, **settings)` calls a verb on a saved toy model; `run.sources` are known by their specs."""
    save_model(tmp_path / "model.safetensors", toy_model(), data=DATA)

    def call(verb, **settings):
        usual = {"model": str(tmp_path / "model.safetensors"), "device": "cpu", "workers": 0}
        return getattr(nextblock, verb)(**{**usual, "max_bad_fraction": 0.5, **settings})

    call.sources = {"toy-0": ToySource(48), "toy-1": ToySource(32, seed=1)}
    for module in OPENERS:
        monkeypatch.setattr(
            f"nextblock.evaluate.{module}.open_source",
            lambda spec, data: call.sources[spec] if spec in call.sources else open_source(spec, data),
        )
    return call


def written(path):
    """A file of JSON, which must not hold NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
