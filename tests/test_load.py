"""`load`: every route to a model, what is refused with the reason and the remedy, and what `info` tells."""

import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from nextblock.checkpoint import CheckpointError, MissingSettingError, UnknownFormatError, save_model
from nextblock.cli.weights import info
from nextblock.errors import UsageError
from nextblock.interop import create_model, initialize, load, load_model
from test_checkpoint import same_weights
from tiny_runs import save_checkpoint
from toy import tiny_images, tiny_model


class Malicious:
    """Its unpickling would make a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def vit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    pooling = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **pooling).eval()


def test_a_run_directory_gives_its_latest_model_and_not_a_half_written_one(tmp_path):
    for step, seed in ((2, 1), (10, 2)):
        save_checkpoint(tmp_path / "checkpoints", tiny_model(seed), {"step": step}, step)
    half = tmp_path / "checkpoints" / ".writing-step_00000099"
    half.mkdir()
    save_model(half / "model.safetensors", tiny_model(3))
    assert same_weights(load(tmp_path), tiny_model(2))
    step = tmp_path / "checkpoints" / "step_00000002"
    assert same_weights(load(step), tiny_model(1))
    assert same_weights(load(str(step / "model.safetensors")), tiny_model(1))


WRAPS = {
    "bare": lambda w: w,
    "prefix": lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
    "compiled": lambda w: {"state_dict": {f"_orig_mod.{name}": tensor for name, tensor in w.items()}},
    "nested": lambda w: {"module": {"state_dict": {f"module._orig_mod.{name}": w[name] for name in w}}},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrappers_are_taken_off_timms_and_xtras_weights(wrap, vit, golden_dir, tmp_path):
    torch.save(wrap(vit.state_dict()), tmp_path / "vit.pth")
    images = tiny_images(size=(32, 32))
    tokens = load_model(tmp_path / "vit.pth", num_heads=3).encode(images).tokens
    torch.testing.assert_close(tokens, vit.forward_features(images), atol=1e-5, rtol=1e-5)
    official = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
    told = {"hyper_parameters": official["hyper_parameters"]}
    torch.save({**told, "module": wrap(official["state_dict"])}, tmp_path / "xtra.ckpt")
    plain = load_model(golden_dir / "xtra_k2.ckpt", num_heads=3)
    assert same_weights(load_model(tmp_path / "xtra.ckpt", num_heads=3), plain)


@pytest.mark.parametrize(("plain", "averaged"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_averaged_weights_are_taken_if_a_file_holds_them_by_every_route(plain, averaged, vit, tmp_path):
    weights = vit.state_dict()
    ema = {name: w + 1 if w.is_floating_point() else w for name, w in weights.items()}
    torch.save({plain: weights, averaged: ema}, tmp_path / "vit.pth")
    started = tiny_model(image_size=32, patch_size=8, block_size=1)
    initialize(started, tmp_path / "vit.pth")
    for model in (started, load_model(tmp_path / "vit.pth", num_heads=3)):
        assert torch.equal(model.state_dict()["encoder.norm.bias"], ema["norm.bias"])


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("xtra_k2.ckpt", {"num_heads": 3, "probe_layers": (1,)}, "does not use probe_layers="),
        ("own.safetensors", {"head": "head.pth"}, "does not use head="),
        ("own.safetensors", {"num_heads": 2}, "records 3 attention heads, not 2"),
        ("own.safetensors", {"num_heads": 0}, "num_heads is 0"),
        ("own.safetensors", {"image_size": (8, 0)}, "image_size is"),
        ("own.safetensors", {"norm_eps": 0.0}, "norm_eps is"),
        ("own.safetensors", {"probe_layers": ()}, "probe_layers is"),
        ("own.safetensors", {"probe_layers": (-1,)}, "probe_layers is"),
    ],
)
def test_settings_that_a_file_has_no_use_for_or_that_cannot_be_are_refused(
    file, settings, words, golden_dir, tmp_path
):
    save_model(tmp_path / "own.safetensors", tiny_model())
    assert load_model(tmp_path / "own.safetensors", num_heads=3).config.num_heads == 3
    with pytest.raises(ValueError, match=words):
        load((tmp_path if file == "own.safetensors" else golden_dir) / file, **settings)


def test_a_file_is_read_once_however_much_it_does_not_tell(golden_dir, tmp_path, monkeypatch):
    parts = [torch.load(golden_dir / f"aim_nano_{p}.pth", weights_only=True) for p in ("backbone", "head")]
    torch.save({**parts[0], **parts[1]}, tmp_path / "both.pth")
    read, load_pickle = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: read.append(a) or load_pickle(*a, **k))
    model = tiny_model(image_size=56, patch_size=14, embed_dim=48, depth=4, block_size=1)
    initialize(model, tmp_path / "both.pth")
    assert len(read) == 1
    for heads, missing in ((None, "how many attention heads"), (3, "which layers its head averages")):
        with pytest.raises(MissingSettingError, match=missing):
            load(tmp_path / "both.pth", num_heads=heads)


def test_a_path_without_one_model_is_refused_with_what_was_looked_for_and_found(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors, check.*found notes\.txt"):
        load(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save({"w": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"\(a\.pth, b\.pth\); name one of them: .*/a"):
        load(tmp_path)


ONE = torch.zeros(1)
LOOPED: dict = {"epoch": 3}
LOOPED["model"] = LOOPED


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"weight": ONE}, "epoch": 3}, "in no known format .it holds: model, epoch.*official XTRA"),
        ({"state_dict": {"conv1.weight": ONE}}, "it holds: state_dict"),
        ([ONE], "it holds: list"),
        (LOOPED, "it holds: epoch, model"),
        (tiny_model().state_dict(), "lost its settings"),
    ],
)
def test_weights_in_no_known_format_are_refused_with_what_they_hold(content, words, tmp_path):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UnknownFormatError, match=words):
        load(tmp_path / "x.ckpt")


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_a_pickle_that_would_run_code_is_refused_with_the_reason_and_does_not_run_it(protocol, tmp_path):
    path, trap = tmp_path / "x.ckpt", tmp_path / "trap"
    if protocol is None:
        torch.save({"state_dict": Malicious(trap), "hyper_parameters": {}}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(trap), protocol=protocol))
    words = r"posix\.mkdir\), and reading it could run code" if protocol is None else r"x\.ckpt"
    with pytest.raises(CheckpointError, match=words):
        load(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *[(length, "cannot be read as a weight.*not complete") for length in (1, 3, 4, 100, -1000, -1)],
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "fetch it by `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", "is an HTML page, not a weight file"),
        ((2).to_bytes(8, "little"), "cannot be read as a weight file: .*not complete"),
        (b"", "the file is empty"),
        (b"\x08\x08\x12\x07pytorch", "is an ONNX file"),
        (b"a letter to a friend", "it is of another kind"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is of another kind"),
        (b"{}", "it is of another kind"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_what_is_cut_or_lies_in_the_place_of_weights_is_named(name, content, words, golden_dir, tmp_path):
    if isinstance(content, int):
        content = (golden_dir / "xtra_k2.ckpt").read_bytes()[:content]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(tmp_path / name)
    assert "miniz" not in str(caught.value)


def told_by_info(capsys, *words):
    info([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def test_info_says_what_is_assumed_or_untold(golden_dir, capsys):
    backbone = golden_dir / "aim_nano_backbone.pth"
    told = told_by_info(capsys, backbone)
    assert (told["config"]["image_size"], told["config"]["num_heads"]) == (224, None)
    assert "the file records none" in told["assumed"]["image_size"]
    assert "how many attention heads" in told["assumed"]["num_heads"]
    told = told_by_info(capsys, backbone, "--num_heads", 3, "--image_size", 56)
    assert told["grid"] == [4, 4]
    assert not told["assumed"]


def test_info_tells_the_tensors_of_an_unknown_file_and_refuses_a_damaged_one(tmp_path, capsys):
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    assert told_by_info(capsys, tmp_path)["tensors"] == {"w": [2]}
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors", {"format": "nextblock"})
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors is damaged"):
        info([str(tmp_path / "foreign.safetensors")])


def test_create_model_builds_a_size_with_any_field_changed():
    model = create_model("xtra-tiny", depth=1, block_size=(2, 4))
    assert (model.config.depth, model.config.block_size, model.config.embed_dim) == (1, (2, 4), 128)
    with pytest.raises(ValueError, match=r"unknown setting 'model.blok_size'"):
        create_model("xtra-tiny", blok_size=2)
    with pytest.raises(ValueError, match="unknown preset 'xtra-tny'; did you mean 'xtra-tiny'"):
        create_model("xtra-tny")
