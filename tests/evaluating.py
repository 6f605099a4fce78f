"""What tests of evaluations share: a saved toy model, toy sources under their names, a table of features."""

import json
import os

import pytest
import torch

import nextblock
from nextblock.checkpoint import save_model
from nextblock.data import open_source
from nextblock.evaluate.features import encoder_extract
from nextblock.evaluate.table import FeatureTable
from nextblock.models.heads import FeatureConfig
from toy import DATA, ToySource, toy_model

CPU = torch.device("cpu")
MEAN_PATCH = FeatureConfig(layers=(1,), norm_layers=True)
EVERY_TOKEN = FeatureConfig(layers=(0,), norm_layers=True, pooled=False)


def toy_extract(*wanted):
    """Features of the toy model, by default the mean patch of its last layer."""
    return encoder_extract(toy_model(), wanted or [MEAN_PATCH])


def toy_table(source, extract=None, *, data=DATA, batch_size=4, keys=({},), **options):
    extract = extract or toy_extract()
    return FeatureTable(extract, source, data, 16, batch_size=batch_size, device=CPU, keys=keys, **options)


class Signals(ToySource):
    """Sends this process a signal when image `at` is read, once."""

    def __init__(self, count, *, at, number=None, **options):
        super().__init__(count, **options)
        self.at, self.number = at, number

    def _read(self, index):
        if index == self.at and self.number is not None:
            number, self.number = self.number, None
            os.kill(os.getpid(), number)
        return super()._read(index)


class Verb:
    """Calls a verb with settings, by default `usual`; `sources` are known by their specs."""

    def __init__(self, sources, **usual):
        self.sources, self.usual = sources, usual

    def __call__(self, verb=None, **settings):
        settings = {**self.usual, **settings}
        usual = settings.pop("verb", None)
        return getattr(nextblock, verb or usual)(**settings)

    def with_usual(self, **usual):
        return Verb(self.sources, **{**self.usual, **usual})


@pytest.fixture(name="run")
def toy_verb(tmp_path, monkeypatch):
    """`run(verb, **settings)` calls a verb on a saved toy model and toy sources."""
    save_model(tmp_path / "model.safetensors", toy_model(), data=DATA)
    run = Verb(
        {"toy-0": ToySource(48), "toy-1": ToySource(32, seed=1)},
        model=str(tmp_path / "model.safetensors"),
        device="cpu",
        workers=0,
        max_bad_fraction=0.5,
    )
    for module in ("splits", "evaluation"):
        monkeypatch.setattr(
            f"nextblock.evaluate.{module}.open_source",
            lambda spec, data: run.sources[spec] if spec in run.sources else open_source(spec, data),
        )
    return run


def written(path):
    """A file of JSON, which must not hold NaN."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)
