"""ONNX out: the graph computes what the model does, at any batch, and its file tells how to feed it.

Exporting runs in a process of its own with JAXTYPING_DISABLE=1: the shape checks of the tests cannot be
traced.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from nextblock.checkpoint import CheckpointError, save_model
from nextblock.config import DataConfig, ModelConfig
from nextblock.evaluate.features import seeded
from nextblock.interop import onnx_export
from nextblock.interop.cards import Provenance
from nextblock.interop.onnx_export import OPSET, OnnxError, write_onnx
from nextblock.models import NextBlockModel
from nextblock.models.classifier import ImageClassifier
from nextblock.models.heads import HeadConfig
from toy import tiny_images

XTRA = ModelConfig(
    image_size=(16, 24), patch_size=4, block_size=2, embed_dim=24, depth=3, num_heads=3, predictor=None
)
AIM = replace(XTRA, block_size=1, positions="sincos", bias=False, patch_norm=True, feature_attention="full")
DATA = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), val_resize_px=19)
FROM_TEST = Provenance(origin="a test", license="mit")


def encoder(config):
    with seeded(0):
        model = NextBlockModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def classifier(config, **head):
    with seeded(1):
        return ImageClassifier(
            encoder(config), HeadConfig(num_classes=5, num_heads=4, **head), tuple("abcde")
        ).eval()


pytestmark = pytest.mark.xdist_group("onnx")

CASES = {
    "xtra": (lambda: encoder(XTRA), {"layers": [2, 0]}),
    "xtra, full": (lambda: encoder(XTRA), {"attention": "full"}),
    "aim, causal": (lambda: encoder(AIM), {"attention": "causal"}),
    "aim, larger": (lambda: encoder(AIM), {"image_size": [32, 48], "layers": [1]}),
    "attentive": (lambda: classifier(XTRA, layers=(1, 2)), {}),
    "linear": (lambda: classifier(AIM, kind="linear", layers=(2,), norm_layers=True), {"layers": [1]}),
}
EXPORT_ALL = """
import json, sys
from pathlib import Path
from nextblock.config import DataConfig
from nextblock.checkpoint import read_model
from nextblock.interop.cards import Provenance
from nextblock.interop.onnx_export import write_onnx
for case in json.loads(sys.argv[1]):
    settings = case["settings"]
    if "image_size" in settings:
        settings["image_size"] = tuple(settings["image_size"])
    difference = write_onnx(
        read_model(Path(case["model"])), Path(case["out"]), **settings,
        data=DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), val_resize_px=19),
        provenance=Provenance(origin="a test", license="mit"),
    )
    assert difference < 1e-4
"""


def in_a_process_of_its_own(code, *arguments):
    environment = {**os.environ, "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """All cases exported by one process: {name: path}; whatever it says is kept."""
    folder = tmp_path_factory.mktemp("onnx")
    cases = []
    for i, (make, settings) in enumerate(CASES.values()):
        save_model(folder / f"{i}.safetensors", make())
        cases.append(
            {"model": f"{folder}/{i}.safetensors", "out": f"{folder}/{i}.onnx", "settings": settings}
        )
    done = in_a_process_of_its_own(EXPORT_ALL, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    return {"said": done.stdout + done.stderr} | {name: folder / f"{i}.onnx" for i, name in enumerate(CASES)}


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_the_model_does(name, batch, graphs):
    make, settings = CASES[name]
    model = make()
    images = tiny_images(batch, size=settings.get("image_size", (16, 24)))
    found = run(graphs[name], images)
    encoder_model = model.encoder_model if isinstance(model, ImageClassifier) else model
    with torch.no_grad():
        encoded = encoder_model.encode(images, attention=settings.get("attention", "native"))
        expected = {"tokens": encoded.tokens}
        expected |= {f"layer_{layer}": encoded.layers[layer] for layer in settings.get("layers", [])}
        if isinstance(model, ImageClassifier):
            expected["logits"] = model(images)
    assert found.keys() == expected.keys()
    for output, tensor in expected.items():
        torch.testing.assert_close(found[output], tensor, rtol=1e-4, atol=1e-4)


def test_the_block_mask_is_in_the_graph(graphs):
    images = tiny_images(1)
    changed = images.clone()
    changed[..., 8:, 16:] += 1  # the last block
    earlier = torch.ones(4, 6, dtype=torch.bool)
    earlier[2:, 4:] = False
    for name, reaches in (("xtra", False), ("xtra, full", True)):
        before, after = (run(graphs[name], some)["tokens"][0] for some in (images, changed))
        assert torch.equal(before[earlier.flatten()], after[earlier.flatten()]) == (not reaches)
        assert not torch.equal(before, after)


def test_the_file_tells_how_to_feed_it(graphs):
    graph = onnx.load(graphs["xtra"])
    told = {entry.key: entry.value for entry in graph.metadata_props}
    assert (json.loads(told["mean"]), json.loads(told["std"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (told["resize_px"], told["image_size"], told["attention"]) == ("19", "[16, 24]", "causal")
    assert (told["origin"], told["license"]) == ("a test", "mit")
    assert json.loads(told["config"])["block_size"] == 2
    larger = {entry.key: entry.value for entry in onnx.load(graphs["aim, larger"]).metadata_props}
    assert (larger["resize_px"], larger["image_size"]) == ("38", "[32, 48]")


def test_the_graph_has_the_stated_operators_and_a_free_batch(graphs):
    graph = onnx.load(graphs["xtra"])
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", OPSET)]
    (images,) = graph.graph.input
    sides = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, 16, 24]


def test_the_exporters_own_talk_stays_off_the_screen(graphs):
    assert graphs["said"] == ""


def test_nothing_but_the_graphs_is_left_behind(graphs):
    assert not [path.name for path in graphs["xtra"].parent.iterdir() if path.name.startswith(".")]


TROUBLE = """
import sys
from pathlib import Path
from nextblock.checkpoint import read_model
from nextblock.config import DataConfig
from nextblock.interop import onnx_export
from nextblock.interop.cards import Provenance
from nextblock.models import NextBlockModel
folder = Path(sys.argv[1])
model = read_model(folder / "model.safetensors")
def write(name):
    try:
        onnx_export.write_onnx(model, folder / name, data=DataConfig(), provenance=Provenance(origin="-"))
    except onnx_export.OnnxError as error:
        print(f"{name}: {error}")
onnx_export.LARGEST_SINGLE_FILE = 0
write("two files.onnx")
onnx_export.TOLERANCE = 1e-12
write("differs.onnx")
NextBlockModel.encode = lambda self, images: images.nonzero().numpy()
write("no graph.onnx")
"""


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    """A folder after three attempts to write a graph to it, and what was said."""
    folder = tmp_path_factory.mktemp("trouble")
    save_model(folder / "model.safetensors", encoder(XTRA))
    done = in_a_process_of_its_own(TROUBLE, str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_graph_that_fails_or_differs_is_said_and_not_left_on_disk(trouble):
    folder, said = trouble
    assert "differs.onnx: onnxruntime differs from torch by" in said
    assert "no graph.onnx: torch cannot export this model as ONNX" in said
    left = ["model.safetensors", "two files.onnx", "two files.onnx.data"]
    assert sorted(path.name for path in folder.iterdir()) == left


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(trouble):
    images = tiny_images()
    found = run(trouble[0] / "two files.onnx", images)["tokens"]
    torch.testing.assert_close(found, encoder(XTRA).encode(images).tokens, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layers", [[3], [-1], [1, 1]])
def test_layers_that_are_not_there_or_named_twice_are_refused(layers, tmp_path):
    with pytest.raises(ValueError, match="name layers from 0 to 2, each once"):
        write_onnx(encoder(XTRA), tmp_path / "x.onnx", data=DATA, provenance=FROM_TEST, layers=layers)


def test_a_classifiers_attention_is_that_of_its_head(tmp_path):
    with pytest.raises(ValueError, match="attention full: this classifier's head is made for 'native'"):
        write_onnx(
            classifier(XTRA, layers=(1,)),
            tmp_path / "x.onnx",
            data=DATA,
            provenance=FROM_TEST,
            attention="full",
        )


def test_a_missing_package_is_told_with_the_words_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_export, "PACKAGES", ("onnx", "onnx_of_tomorrow"))
    with pytest.raises(OnnxError, match=r"needs onnx_of_tomorrow: pip install onnx onnx_of_tomorrow"):
        write_onnx(encoder(XTRA), tmp_path / "x.onnx", data=DATA, provenance=FROM_TEST)


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_behind(monkeypatch, tmp_path):
    def save(*_, **__):
        raise OSError(28, "No space left on device")

    program = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=save)
    monkeypatch.setattr(onnx_export, "_exported", lambda *_: program)
    with pytest.raises(CheckpointError, match=r"could not write .*x\.onnx: .*No space left.*Make room"):
        write_onnx(encoder(XTRA), tmp_path / "x.onnx", data=DATA, provenance=FROM_TEST)
    assert not any(tmp_path.iterdir())


def test_quiet_keeps_errors_and_puts_levels_back():
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with onnx_export._quiet():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert logger.level == before


def test_a_nan_counts_as_a_difference(graphs):
    outputs = onnx_export._outputs(encoder(XTRA), (2, 0), "native", None)
    assert onnx_export._difference(outputs, graphs["xtra"]) < 1e-4
    with torch.no_grad():
        outputs.encoder_model.get_parameter("encoder.norm.weight")[0] = np.nan
    assert onnx_export._difference(outputs, graphs["xtra"]) == np.inf
