"""What the tests of probes share: a quick probe of toy sources, and `probe` made to find them by name."""

from dataclasses import replace

import torch

from nextblock.evaluate import features as features_module
from nextblock.evaluate import sources as evaluation_sources
from nextblock.evaluate.probe.config import ProbeConfig
from nextblock.evaluate.probe.run import probe_model
from toy import DATA, ToySource, toy_model

QUICK = ProbeConfig(
    model="RUN",
    train="toy-0",
    val="toy-1",
    out="OUT",
    epochs=12,
    batch_size=16,
    lr=(1e-2,),
    attentive_heads=4,
    baselines=False,
    device="cpu",
)


def run(config=QUICK, *, train=None, val=None, data=DATA):
    train, val = train or ToySource(96), val or ToySource(48, seed=1)
    return probe_model(toy_model(), config, train, {"val": val}, data)


def weights(found, head):
    return torch.cat(
        [weight.flatten().float() for weight in found.classifiers[head].head.state_dict().values()]
    )


def known_config(monkeypatch, tmp_path):
    """`probe` finds a toy model and toy sources under the names in its config; OUT is a fresh directory."""
    sources = {"toy-0": ToySource(96), "toy-1": ToySource(48, seed=1), "toy-2": ToySource(40, seed=2)}
    monkeypatch.setattr(evaluation_sources, "open_source", lambda spec, data: sources[spec])
    monkeypatch.setattr(
        features_module, "open_encoder", lambda spec, num_heads: toy_model(int(spec[3:] or 0))
    )
    return replace(QUICK, out=str(tmp_path / "out"), epochs=2)
