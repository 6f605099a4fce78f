"""ONNX out: the graph computes what the model does, at any batch, and its file tells how to feed it.

Exporting runs in a process of its own with JAXTYPING_DISABLE=1: the shape checks of the tests cannot be
traced.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch

from nextblock.checkpoint import CheckpointError, save_model
from nextblock.config import DataConfig
from nextblock.evaluate.features import seeded
from nextblock.interop.cards import Provenance
from nextblock.interop.onnx import OPSET, OnnxError, write_onnx
from nextblock.models.heads import HeadConfig, ImageClassifier
from test_interop_timm import AIM, NEWER, XTRA, encoder
from toy import tiny_images


def classifier(config, **head):
    with seeded(1):
        head_config = HeadConfig(num_classes=5, num_heads=4, **head)
        return ImageClassifier(encoder(config), head_config, tuple("abcde")).eval()


SHALLOW = replace(AIM, depth=1)
CASES = {
    "xtra, attentive": (classifier(replace(XTRA, depth=2), layers=(0, 1)), {"layers": [1, 0]}),
    "nepa": (classifier(replace(NEWER["nepa"], depth=1), kind="linear", layers=(0,), tokens="joined"), {}),
    "aim": (encoder(SHALLOW), {"attention": "causal", "image_size": [32, 48], "layers": [0]}),
    "aim, linear": (classifier(SHALLOW, kind="linear", layers=(0,), norm_layers=True), {}),
}
"""Models, and how each is exported."""
# Exports all models, the last one in two files, then tries what must fail (with the first graph, as exporting
# is slow), in a process whose state is compared before and after.
CODE = """
import json, logging, os, sys, warnings
from pathlib import Path
import torch
from torch.onnx._internal.exporter import _onnx_program
from nextblock.checkpoint import read_model
from nextblock.config import DataConfig
from nextblock.interop import onnx
from nextblock.interop.cards import Provenance
from nextblock.models import NextBlockModel
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
TOLD = {"data": DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), val_resize_px=19),
        "provenance": Provenance(origin="a test", license="mit")}
def state():
    levels = [logging.getLogger(name).level for name in onnx.TALKATIVE]
    return levels, list(warnings.filters), torch.is_grad_enabled(), torch.get_rng_state().sum().item()
os.umask(0o027)
models = [read_model(folder / f"{i}.safetensors") for i in range(len(cases))]
before, programs, export = state(), [], torch.onnx.export
def keep(*args, **kwargs):
    programs.append(export(*args, **kwargs))
    return programs[-1]
torch.onnx.export = keep
for i, settings in enumerate(cases):
    if "image_size" in settings:
        settings["image_size"] = tuple(settings["image_size"])
    if i == len(cases) - 1:
        _onnx_program._LARGE_MODEL_THRESHOLD = 0
    assert onnx.write_onnx(models[i], folder / f"{i}.onnx", **settings, **TOLD) < 1e-4
assert state() == before
def refused(name):
    try:
        onnx.write_onnx(models[0], folder / name, layers=cases[0]["layers"], **TOLD)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
def full_disk(*_, **__):
    raise OSError(28, "No space left on device")
said = {}
torch.onnx.export = lambda *_, **__: programs[0]
onnx.TOLERANCE = 1e-12
said["differs"] = refused("differs.onnx")
programs[0].save = full_disk
said["disk"] = refused("disk.onnx")
torch.onnx.export = export
NextBlockModel.encode = lambda self, images, **_: images.nonzero().numpy()
said["no graph"] = refused("no graph.onnx")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The folder of all graphs, {name: path}, and what was refused, {name: message}."""
    folder = tmp_path_factory.mktemp("onnx")
    for i, model in enumerate(model for model, _ in CASES.values()):
        save_model(folder / f"{i}.safetensors", model)
    settings = json.dumps([settings for _, settings in CASES.values()])
    command = [sys.executable, "-c", CODE, str(folder), settings]
    environment = {**os.environ, "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the exporter's own words stay off the screen
    return folder, {name: folder / f"{i}.onnx" for i, name in enumerate(CASES)}, json.loads(done.stdout)


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


def metadata_of(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_graph_computes_what_the_model_does_at_any_batch(name, graphs):
    model, settings = CASES[name]
    encoder_model = model.encoder_model if isinstance(model, ImageClassifier) else model
    for batch in (1, 5):
        images = tiny_images(batch, size=settings.get("image_size", (16, 24)))
        encoded = encoder_model.encode(images, attention=settings.get("attention", "native"))
        expected = {f"layer_{layer}": encoded.layers[layer] for layer in settings.get("layers", [])}
        expected["tokens"] = encoded.tokens
        if isinstance(model, ImageClassifier):
            expected["logits"] = model(images)
        torch.testing.assert_close(run(graphs[1][name], images), expected, rtol=1e-4, atol=1e-4)


def test_the_file_tells_how_to_feed_it(graphs):
    graph, metadata = onnx.load(graphs[1]["xtra, attentive"]), metadata_of(graphs[1]["xtra, attentive"])
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert [metadata[key] for key in ("resize_px", "image_size", "attention", "origin", "license")] == [
        "19", "[16, 24]", "causal", "a test", "mit",
    ]  # fmt: skip
    assert json.loads(metadata["config"])["block_size"] == 2
    larger = metadata_of(graphs[1]["aim"])
    assert (larger["resize_px"], larger["image_size"]) == ("38", "[32, 48]")
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", OPSET)]
    (images,) = graph.graph.input
    sides = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, 16, 24]


def test_what_is_on_the_disk_follows_the_umask_and_no_graph_that_fails_or_differs_is_left(graphs):
    folder, _, said = graphs
    written = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.glob("*.onnx*")}
    assert set(written.values()) == {"0o640"}
    assert [name for name in written if name.endswith(".data")] == ["3.onnx.data"]  # large weights
    assert said["differs"].startswith("OnnxError: onnxruntime differs from torch by")
    assert said["no graph"].startswith("OnnxError: torch cannot export this model as ONNX")
    assert said["disk"].startswith("CheckpointError: could not write")
    assert "No space left on device. Make room" in said["disk"]
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".", *said))]


@pytest.mark.parametrize(
    ("model", "settings", "error", "words"),
    [
        ("aim", {"layers": [1]}, ValueError, "name layers from 0 to 0, each once"),
        ("aim", {"layers": [-1]}, ValueError, "name layers from 0 to 0, each once"),
        ("aim", {"layers": [0, 0]}, ValueError, "name layers from 0 to 0, each once"),
        ("aim, linear", {"attention": "causal"}, ValueError, "this classifier's head is made for 'native'"),
        ("damaged", {}, CheckpointError, r"NaN or inf in 1 tensor \(encoder\.norm\.weight\)"),
        ("no onnxscript", {}, OnnxError, "needs onnxscript: pip install onnx onnxruntime onnxscript"),
    ],
)
def test_impossible_requests_are_refused(model, settings, error, words, monkeypatch, tmp_path):
    damaged = encoder(SHALLOW)
    with torch.no_grad():
        damaged.get_parameter("encoder.norm.weight")[0] = torch.nan
    if model == "no onnxscript":
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    chosen = CASES.get(model, [damaged])[0]
    told = {"data": DataConfig(), "provenance": Provenance(origin="-")}
    with pytest.raises(error, match=words):
        write_onnx(chosen, tmp_path / "x.onnx", **told, **settings)
