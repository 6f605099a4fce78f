"""`load` on the formats of others: told apart by content, joined, and refused with what is missing."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from nextblock.checkpoint import CheckpointError, MissingSettingError, UnknownFormatError, save_model
from nextblock.cli import main
from nextblock.cli.info import run as info
from nextblock.interop import initialize, load, load_model
from nextblock.interop.aim_out import write_aim
from nextblock.interop.reading import Told, _check_layers
from nextblock.models import NextBlockModel
from nextblock.models.heads import ImageClassifier
from toy import tiny_images, tiny_model

NANO = {
    "image_size": 56,
    "patch_size": 14,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "positions": "sincos",
    "patch_norm": True,
    "bias": False,
    "block_size": 1,
    "feature_attention": "full",
}

# ----------------------------------------------------------------------------------------------- official AIM


def test_a_backbone_is_an_encoder_and_with_its_head_a_classifier(golden_dir):
    reference = load_file(golden_dir / "aim_nano.safetensors")
    backbone, head = golden_dir / "aim_nano_backbone.pth", golden_dir / "aim_nano_head.pth"
    encoder = load(backbone, num_heads=3)
    assert isinstance(encoder, NextBlockModel)
    layers = encoder.encode(reference["images"]).layers
    torch.testing.assert_close(torch.stack(layers), reference["layer_features"], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot predict"):
        encoder(reference["images"])
    classifier = load(backbone, head=head, num_heads=3, probe_layers=(1, 2))
    assert isinstance(classifier, ImageClassifier)
    torch.testing.assert_close(classifier(reference["images"]), reference["logits"], atol=1e-4, rtol=1e-4)


def test_the_training_codes_layout_is_a_whole_model(golden_dir):
    reference = load_file(golden_dir / "aim_pretrain_nano.safetensors")
    model = load_model(golden_dir / "aim_pretrain_nano_weights.safetensors", num_heads=3)
    out = model(reference["images"], prefix_lengths=reference["prefix_lengths"])
    torch.testing.assert_close(out.loss, reference["loss"][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("given", "missing"), [({}, "num_heads"), ({"num_heads": 3}, "probe_layers")])
def test_what_an_aim_file_does_not_tell_is_asked_for(golden_dir, given, missing):
    head = golden_dir / "aim_nano_head.pth"
    with pytest.raises(MissingSettingError, match=missing) as caught:
        load(golden_dir / "aim_nano_backbone.pth", head=head, **given)
    assert caught.value.setting == missing


def test_a_head_alone_is_told_to_need_its_backbone(golden_dir):
    with pytest.raises(UnknownFormatError, match="load its backbone, with head= this file"):
        load(golden_dir / "aim_nano_head.pth")


def test_a_head_that_is_none_is_refused(golden_dir):
    with pytest.raises(CheckpointError, match=r"aim_nano_backbone\.pth is no head of an AIM classifier"):
        load(golden_dir / "aim_nano_backbone.pth", head=golden_dir / "aim_nano_backbone.pth", num_heads=3)


def test_a_directory_of_backbone_and_head_is_a_classifier(golden_dir, tmp_path):
    shutil.copy(golden_dir / "aim_nano_backbone.pth", tmp_path / "backbone.pth")
    shutil.copy(golden_dir / "aim_nano_head.pth", tmp_path / "head.pth")
    assert isinstance(load(tmp_path, num_heads=3, probe_layers=(1, 2)), ImageClassifier)


def test_what_apples_hub_files_say_beside_them_is_read(golden_dir, tmp_path):
    """One file holds backbone and head; config.json tells heads, layers and image size."""
    weights = {
        **torch.load(golden_dir / "aim_nano_backbone.pth", weights_only=True),
        **torch.load(golden_dir / "aim_nano_head.pth", weights_only=True),
    }
    save_file(weights, tmp_path / "model.safetensors")
    told = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "num_blocks": 4, "num_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps({**told, "probe_layers": [1, 2]}))
    reference = load_file(golden_dir / "aim_nano.safetensors")
    found = load(tmp_path)
    assert isinstance(found, ImageClassifier)
    torch.testing.assert_close(found(reference["images"]), reference["logits"], atol=1e-4, rtol=1e-4)
    other = load(tmp_path, probe_layers=(0, 1))
    assert isinstance(other, ImageClassifier)
    assert other.head_config.layers == (0, 1)


# ------------------------------------------------------------------------------------------------------- timm


@pytest.fixture
def vit():
    """A timm ViT without class token, 24 wide."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5,
        class_token=False, global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_timm_vits_state_dict_is_an_encoder_of_the_same_features(vit, wrapper, tmp_path):
    weights = vit.state_dict()
    torch.save(weights if wrapper is None else {wrapper: weights}, tmp_path / "vit.pth")
    found = load_model(tmp_path / "vit.pth", num_heads=3)
    images = tiny_images(size=(32, 32))
    expected = vit.forward_features(images)
    torch.testing.assert_close(found.encode(images).tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_class_token_is_refused_but_for_starting_from(tmp_path, caplog):
    spec = "timm:vit_tiny_patch16_224,pretrained=false"
    with pytest.raises(CheckpointError, match=r"cls_token.*As model\.init"):
        load(spec)
    model = tiny_model(image_size=32, patch_size=16, block_size=1, embed_dim=192, depth=12)
    with caplog.at_level(logging.INFO):
        report = initialize(model, spec)
    assert report.resampled == ("encoder.pos_embed",)
    assert all(name.startswith("predictor.") for name in report.fresh)
    assert "cls_token" in caplog.text


# -------------------------------------------------------------------------------- settings that are of no use


@pytest.mark.parametrize(
    ("file", "settings", "name"),
    [
        ("xtra_k2.ckpt", {"num_heads": 3, "probe_layers": (1,)}, "probe_layers"),
        ("xtra_k2.ckpt", {"num_heads": 3, "head": "head.pth"}, "head"),
        ("own.safetensors", {"head": "head.pth"}, "head"),
        ("xtra_k2.ckpt", {"num_heads": 3, "norm_eps": 0.5}, "norm_eps"),
        ("xtra_k2.ckpt", {"num_heads": 3, "image_size": 999}, "image_size"),
        ("timm:vit_tiny_patch16_224,pretrained=false", {"head": "head.pth"}, "head"),
    ],
)
def test_a_setting_that_a_file_has_no_use_for_is_refused(file, settings, name, golden_dir, tmp_path):
    save_model(tmp_path / "own.safetensors", tiny_model())
    path = next((d / file for d in (tmp_path, golden_dir) if (d / file).exists()), file)
    with pytest.raises(ValueError, match=f"no use for {name}="):
        load(path, **settings)


def test_a_number_of_heads_is_taken_where_it_is_the_files_own_and_else_refused(tmp_path):
    path = tmp_path / "own.safetensors"
    save_model(path, tiny_model())
    assert load_model(path, num_heads=3).config.num_heads == 3
    with pytest.raises(ValueError, match="has 3 attention heads, as it tells itself, and not 2"):
        load(path, num_heads=2)


def test_several_weight_files_in_a_directory_are_refused(tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save({"w": torch.zeros(1)}, tmp_path / name)
    (tmp_path / "README.md").touch()
    with pytest.raises(
        CheckpointError, match=r"several weight files \(a\.pth, b\.pth\); name one of them: .*/a"
    ):
        load(tmp_path)


def test_of_one_model_in_two_formats_safetensors_is_read(golden_dir, tmp_path):
    save_file(
        torch.load(golden_dir / "aim_nano_backbone.pth", weights_only=True), tmp_path / "model.safetensors"
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, "embed_dim": 48, "img_size": 56}))
    assert load_model(tmp_path).config.image_size == 56
    assert load_model(tmp_path / "model.safetensors").config.num_heads == 3
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, "embed_dim": 1536}))
    with pytest.raises(MissingSettingError, match="num_heads"):  # the settings of another model
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON .*; mend it"):
        load(tmp_path)


# --------------------------------------------------------------------------------------- wrappers and rubbish


WRAPS = {
    "prefix": lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
    "compiled": lambda w: {"state_dict": {f"_orig_mod.{name}": tensor for name, tensor in w.items()}},
    "nested": lambda w: {"module": {"state_dict": {f"module._orig_mod.{name}": w[name] for name in w}}},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrappers_are_taken_off_timms_and_xtras_weights_too(wrap, vit, golden_dir, tmp_path):
    torch.save(wrap(vit.state_dict()), tmp_path / "vit.pth")
    assert load_model(tmp_path / "vit.pth", num_heads=3).config.embed_dim == 24
    official = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
    told = {"hyper_parameters": official["hyper_parameters"]}
    torch.save({**told, "module": wrap(official["state_dict"])}, tmp_path / "xtra.ckpt")
    found, plain = (
        load_model(d / f, num_heads=3) for d, f in ((tmp_path, "xtra.ckpt"), (golden_dir, "xtra_k2.ckpt"))
    )
    assert all(torch.equal(w, found.state_dict()[name]) for name, w in plain.state_dict().items())


def test_what_lightning_saves_by_deepspeed_is_read_from_its_directory(golden_dir, tmp_path):
    (tmp_path / "x.ckpt" / "checkpoint").mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        shutil.copy(golden_dir / "xtra_k2.ckpt", tmp_path / "x.ckpt" / "checkpoint" / name)
    for directory in (tmp_path / "x.ckpt", tmp_path / "x.ckpt" / "checkpoint"):
        assert load_model(directory, num_heads=3).config.block_size == 2


def xtra(change):
    """The content of an official file, changed."""

    def changed(golden_dir):
        content = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
        return change(content, content["state_dict"]) or content

    return changed


def without(weights, start):
    for name in [name for name in weights if name.startswith(start)]:
        del weights[name]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (xtra(lambda _, w: w), "without the settings .*; give the original checkpoint"),
        (xtra(lambda c, _: c.update(hyper_parameters="all")), "without the settings it was trained by"),
        (
            xtra(lambda _, w: without(w, "enc.blocks")),
            r"lacks 'enc\.blocks\.0'.*take the original, whole file",
        ),
        (xtra(lambda _, w: without(w, "predictor.blocks")), r"lacks 'predictor\.blocks\.0"),
        (
            xtra(lambda _, w: w.update({"enc.patch_embed.proj.weight": torch.zeros(4, 4)})),
            "only convolutions",
        ),
    ],
)
def test_an_xtra_file_that_is_not_whole_is_refused_in_one_line(content, told, golden_dir, tmp_path):
    torch.save(content(golden_dir), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=told):
        load(tmp_path / "x.ckpt", num_heads=3)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ([torch.zeros(1)], "is no head of an AIM classifier"),
        ({"head.cls_token": torch.zeros(1, 1, 48)}, r"lacks 'head\.linear\.weight'"),
        (None, r"head\.pth does not exist; give the path"),
    ],
)
def test_a_head_file_that_is_missing_or_not_whole_is_refused(head, told, golden_dir, tmp_path):
    if head is not None:
        torch.save(head, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=told):
        load(golden_dir / "aim_nano_backbone.pth", tmp_path / "head.pth", num_heads=3, probe_layers=(1,))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "fetch it by `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", "is an HTML page, and not a weight file"),
        ((2).to_bytes(8, "little"), "cannot be read as a weight file: .*not complete"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_what_lies_in_the_place_of_weights_is_named(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        load(tmp_path / name)


@pytest.mark.parametrize("given", [1, ("best",), (), (-1,), "first", (1.0,)])
def test_probe_layers_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match='give "last", "best", or a list of layers'):
        _check_layers(given)


@pytest.mark.parametrize(
    "setting", [{"num_heads": 0}, {"image_size": 0}, {"image_size": (8, 0)}, {"norm_eps": 0.0}]
)
def test_numbers_that_are_none_are_refused(setting):
    with pytest.raises(ValueError, match="it must be "):
        Told(**setting)


# ------------------------------------------------------------------------------------------- the command line


def test_a_setting_that_is_missing_is_wrong_usage_and_named_as_it_is_typed(golden_dir, tmp_path, capsys):
    assert main(["convert", str(golden_dir / "aim_nano_backbone.pth"), str(tmp_path / "out")]) == 2
    assert "give it as num_heads= (--num_heads)" in capsys.readouterr().err


def test_info_says_which_size_is_assumed_and_takes_another(golden_dir, capsys):
    words = [str(golden_dir / "aim_nano_backbone.pth"), "--num_heads", "3", "--json"]
    info(words)
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["image_size"] == 224
    assert "the file tells none" in told["image_size (assumed)"]
    info([*words, "--image_size", "56"])
    told = json.loads(capsys.readouterr().out)
    assert told["grid"] == [4, 4]
    assert "image_size (assumed)" not in told


def test_info_tells_the_tensors_of_an_unknown_file_in_a_directory(tmp_path, capsys):
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    info([str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["tensors"] == {"w": [2]}


def test_what_is_written_in_apples_layout_is_read_from_its_directory(tmp_path):
    model = tiny_model(**NANO, predictor=None)
    write_aim(model, tmp_path / "aim")
    found = load_model(tmp_path / "aim", num_heads=3)
    images = tiny_images(size=(56, 56))
    assert torch.equal(found.encode(images).tokens, model.encode(images).tokens)
