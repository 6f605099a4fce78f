"""`convert`: from every format to every other the same function, with its data, origin and licence."""

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer

from nextblock.checkpoint import read_data, save_model
from nextblock.cli.weights import convert as run
from nextblock.config import DataConfig
from nextblock.errors import UsageError
from nextblock.interop import load, load_model
from nextblock.interop.cards import UNSPECIFIED, Provenance, model_card, read_provenance
from nextblock.interop.convert import Converted, convert, target_of
from nextblock.interop.timm_spec import read_timm_data
from tiny_runs import save_checkpoint
from toy import tiny_images, tiny_model

DATA = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), val_resize_px=31)


@pytest.fixture
def run_dir(tmp_path):
    save_checkpoint(tmp_path / "my-run" / "checkpoints", tiny_model(), {"step": 3}, 3, data=DATA)
    return tmp_path / "my-run"


def head_of(directory):
    return yaml.safe_load((directory / "README.md").read_text().split("---")[1])


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_run_goes_to_timm_and_back_with_its_features_its_data_and_the_umasks_mode(run_dir, tmp_path):
    before = os.umask(0o027)
    try:
        done = convert(run_dir, tmp_path / "timm", to="timm")
        convert(tmp_path / "timm", tmp_path / "back")
    finally:
        os.umask(before)
    files = [*(tmp_path / "timm").iterdir()]
    size = sum(path.stat().st_size for path in files)
    assert (done.to, done.place, done.num_bytes) == ("timm", str(tmp_path / "timm"), size)
    assert {path.stat().st_mode & 0o777 for path in [*files, *(tmp_path / "back").iterdir()]} == {0o640}
    assert read_timm_data(tmp_path / "timm") == read_data(tmp_path / "back" / "model.safetensors") == DATA
    for name in ("timm", "back"):
        found = load_model(tmp_path / name).encode(tiny_images())
        assert_same(found.tokens, tiny_model().encode(tiny_images()).tokens)


def test_an_official_file_becomes_a_whole_model_that_cuts_as_officially(golden, golden_dir, tmp_path):
    convert(golden_dir / "xtra_k2.ckpt", tmp_path / "whole", num_heads=3)
    tensors, found = golden("xtra_k2"), load(tmp_path / "whole")
    assert_same(found(tensors["images"]).loss, tensors["loss"].squeeze())
    assert read_data(tmp_path / "whole" / "model.safetensors") == DataConfig(val_resize_px=73)  # 8/7 of 64


@torch.no_grad()
def test_a_classifier_keeps_its_head_or_says_that_it_is_left_out(golden_dir, golden, tmp_path, caplog):
    tensors, src, own = golden("aim_nano"), golden_dir / "aim_nano_backbone.pth", tmp_path / "own"
    head = golden_dir / "aim_nano_head.pth"
    told = {"head": head, "num_heads": 3, "probe_layers": (1, 2), "image_size": 56}
    convert(src, own, **told)
    found: Any = load(own)
    assert_same(found(tensors["images"]), tensors["logits"], 1e-4)
    assert load_model(own).config.image_size == 56
    card = (own / "README.md").read_text()
    assert "logits = model(images)" in card
    assert "With a head (attentive) of 10 classes" in card
    with caplog.at_level(logging.INFO):
        convert(src, tmp_path / "timm", to="timm", **told)
    assert "left out: the classifier's attentive head" in caplog.text
    vit: Any = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    assert type(vit) is VisionTransformer
    layers: Any = vit.forward_intermediates(tensors["images"], output_fmt="NLC", intermediates_only=True)
    assert_same(torch.stack(layers), tensors["layer_features"], 1e-4)
    assert "Apple's own licence" in head_of(tmp_path / "timm")["weights_license"]


def test_the_card_tells_origin_and_licence_as_given_or_found_through_further_conversions(
    golden_dir, run_dir, tmp_path
):
    words = {"license": "other", "license_name": "a-b", "license_link": "https://x.org/l"}
    of_run = {"weights_origin": "my-run, pre-trained with nextblock"}
    given = {"license": "apache-2.0", "weights_license": "Apache-2.0", "weights_origin": "our X-rays"}
    official = {"weights_origin": "xtra_k2.ckpt, in the layout of official XTRA files"}
    convert(run_dir, tmp_path / "unsaid")
    assert head_of(tmp_path / "unsaid").items() >= of_run.items()
    assert "license" not in head_of(tmp_path / "unsaid")
    convert(run_dir, tmp_path / "given", license="Apache-2.0", origin="our X-rays")
    assert head_of(tmp_path / "given").items() >= given.items()
    (run_dir / "README.md").write_text(f"---\n{yaml.safe_dump(words)}---\n")
    for src, told in ((golden_dir / "xtra_k2.ckpt", official), (run_dir, of_run | words)):
        one, two, three = (tmp_path / f"{src.stem}-{number}" for number in (1, 2, 3))
        convert(src, one, to="timm", num_heads=3)
        convert(one, two)
        convert(two / "model.safetensors", three, to="timm")
        for head in map(head_of, (one, two, three)):
            assert head.items() >= told.items()
            stated = "none is stated for the official XTRA weights" in head["weights_license"]
            assert stated == (src != run_dir)
    convert(run_dir, tmp_path / "other", license="mit")
    assert head_of(tmp_path / "other")["license"] == "mit"
    assert words["license_link"] not in (tmp_path / "other" / "README.md").read_text()


def test_the_origin_names_the_teacher_and_the_weights_that_a_run_started_from(tmp_path):
    model = tiny_model(target="features", teacher="timm:someones", teacher_dim=8)
    model.config = replace(model.config, init="hf:someone/model")
    save_model(tmp_path / "model.safetensors", model)
    convert(tmp_path / "model.safetensors", tmp_path / "started")
    trained = "pre-trained with nextblock on features of timm:someones, started from hf:someone/model"
    assert trained in head_of(tmp_path / "started")["weights_origin"]


@pytest.mark.parametrize("text", ["no head", "---\n: :\n---\n", "---\ntags: [a]\n---\n", ""])
def test_a_card_that_names_neither_origin_nor_licence_says_nothing(text, tmp_path, caplog):
    (tmp_path / "README.md").write_text(text)
    assert read_provenance(tmp_path, origin="here") is None
    assert not caplog.records


@pytest.mark.parametrize("license_text", [UNSPECIFIED, "mit", "for research: ask me, 'first'"])
def test_a_card_is_read_as_it_was_written(license_text, tmp_path):
    told = Provenance(origin="x: y", license=license_text)
    settings = {"title": "t", "library": "timm", "data": DATA, "provenance": told, "opening": ""}
    card = model_card(tiny_model().config, notes=["a note"], **settings)
    (tmp_path / "README.md").write_text(card)
    assert read_provenance(tmp_path, origin="elsewhere") == told
    assert re.fullmatch(r"[a-z0-9.-]+", head_of(tmp_path).get("license_name", "mit"))
    assert "| attention of its features | block-causal, blocks of 2x2 patches, raster order |" in card
    assert card.endswith("\n- a note\n")


@pytest.mark.parametrize(
    ("dst", "to", "expected"),
    [
        ("x.ONNX", None, "onnx"),
        ("x", "onnx", "onnx"),
        ("v1.5", None, "nextblock"),
        ("v1.5", "timm", "timm"),
        ("hf:me/x.onnx", None, "nextblock"),
        ("v1.onx", "timm", "timm"),
        ("x.onnx", "timm", r"needs a directory, not \.onnx; name a"),
        ("x.ckpt", None, r"needs a directory, not \.ckpt; name a"),
        ("x.pth", "onnx", r"needs an \.onnx file, not \.pth; name an"),
        ("x.onx", None, r"misspelt \.onnx;"),
    ],
)
def test_the_suffix_tells_the_format_unless_one_is_given_and_must_not_contradict_it(dst, to, expected):
    if expected in ("nextblock", "timm", "onnx"):
        assert target_of(dst, to) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            target_of(dst, to)


@pytest.mark.parametrize(
    ("place", "settings", "words"),
    [
        ("out", {"to": "timm", "layers": [1]}, "layers does not apply to the format timm, only to onnx"),
        ("out", {"to": "nextblock", "attention": "full"}, "attention does not apply to the format nextblock"),
        ("out", {"image_size": 32}, r"keeps its image size of \(16, 24\) px.*to timm or onnx"),
        (".", {}, "exists already; name a new place"),
        ("photo.jpg", {}, "exists already; name a new place"),
        ("my-run", {}, "exists already; name a new place"),
        ("empty", {"to": "onnx"}, "exists already; name a new place"),
        ("photo.jpg/out", {"to": "timm"}, r"photo\.jpg is a file; choose another place"),
        ("/proc/a/out", {"to": "timm"}, "cannot make or write the directory /proc/a: .*; choose another"),
    ],
)
def test_meaningless_settings_and_taken_or_impossible_places_are_refused(
    place, settings, words, run_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").touch()
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=words):
        convert(run_dir, place, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "my-run", "photo.jpg"]
    convert(run_dir, "empty")
    assert Path("empty/model.safetensors").is_file()


def test_the_command_writes_and_tells_what_it_wrote(run_dir, tmp_path, capsys):
    words = [str(run_dir), str(tmp_path / "out"), "--to", "timm", "--image_size", "[32,24]", "--json"]
    assert run([*words, "--license", "mit"]) == 0
    line, told = capsys.readouterr().out.splitlines()
    assert line.startswith(f"timm: {tmp_path}/out (0.")
    assert json.loads(told)["place"] == f"{tmp_path}/out"
    assert load_model(tmp_path / "out").config.image_size == (32, 24)
    assert head_of(tmp_path / "out")["license"] == "mit"


@pytest.mark.slow
def test_the_command_writes_onnx_in_a_process_of_its_own(golden_dir, tmp_path):
    words = [str(golden_dir / "xtra_k2.ckpt"), f"{tmp_path}/x.onnx", "--to", "onnx", "--layers", "3"]
    code = "import sys; from nextblock.cli.weights import convert as run; sys.exit(run(sys.argv[1:]))"
    environment = {**os.environ, "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *words, "--layers", "1", "--num_heads", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    line, told = done.stdout.splitlines()
    assert "onnxruntime within" in line
    assert 0 < json.loads(told)["difference"] < 1e-4


@pytest.mark.parametrize(("words", "layers"), [(["last"], "last"), (["1", "--probe_layers", "2"], (1, 2))])
def test_probe_layers_are_names_or_numbers(words, layers, monkeypatch):
    asked = []

    def record(src, dst, to, **settings):
        asked.append(settings["probe_layers"])
        return Converted(target_of(dst, to), dst, 0, None)

    monkeypatch.setattr("nextblock.interop.convert.convert", record)
    assert run(["src", "dst", "--probe_layers", *words]) == 0
    assert asked == [layers]
    with pytest.raises(UsageError, match="probe_layers is 'lost'; did you mean last"):
        run(["src", "dst", "--probe_layers", "lost"])
