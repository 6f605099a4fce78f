"""timm's models, directories and weight files as encoders here: the same function, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

from nextblock.checkpoint import CheckpointError
from nextblock.evaluate.features import seeded
from nextblock.interop import load
from nextblock.interop.files import LoadOptions
from nextblock.interop.hub import HubError
from nextblock.interop.load import recorded_data
from nextblock.interop.timm import from_timm, is_timm_directory, read_timm, read_timm_weights
from nextblock.interop.timm_spec import open_timm_encoder, read_timm_data, timm_model, timm_provenance
from nextblock.models import NextBlockModel
from nextblock.models.vit import positions_of
from nextblock.settings import to_dict
from test_interop_timm import CONFIGS, DATA, TINY_VIT, XTRA, assert_same, encoder, opened, written
from toy import tiny_images

PLAIN = {**TINY_VIT, "num_classes": 0, "class_token": False, "global_pool": "avg", "fc_norm": False}


def tiny_vit(**changes) -> Any:
    """A timm ViT with random weights, LayerScale's included."""
    with seeded(1):
        vit = VisionTransformer(**{**PLAIN, **changes}).eval()
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return vit


def saved_by_timm(directory, **changes) -> Any:
    """A directory as timm's users write it."""
    with seeded(2):
        vit = timm.create_model("vit_base_patch16_224", **{**PLAIN, **changes}).eval()
    save_for_hf(vit, directory, model_args={**PLAIN, **changes}, safe_serialization="both")
    return vit


def changed_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---------------------------------------------------------------------------------------- timm's own models


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_values": 0.5},
        {"init_values": 0.5, "proj_bias": False, "qkv_bias": False},
        {"qkv_bias": False},
        {"embed_norm_layer": "layernorm"},
        {"img_size": (16, 24)},
        {"mlp_ratio": 48 / 11},
        {"num_classes": 7, "drop_path_rate": 0.1},
        {"global_pool": "map"},
    ],
)
def test_a_timm_vit_without_class_token_is_the_same_function(changes):
    vit = tiny_vit(**changes)
    images = tiny_images(size=vit.patch_embed.img_size)
    encoded = from_timm(vit, "timm").encode(images)
    final, layers = vit.forward_intermediates(images, output_fmt="NLC")
    for found, expected in zip((encoded.tokens, *encoded.layers), (final, *layers), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("file", ["", "model.safetensors", "pytorch_model.bin"])
def test_a_directory_that_timm_wrote_and_its_files_are_the_same_function(tmp_path, file):
    vit = saved_by_timm(tmp_path, num_classes=7, init_values=0.1)
    model = load(tmp_path / file)  # by config.json, which lies beside a file too
    assert isinstance(model, NextBlockModel)
    assert model.config.feature_attention == "full"
    images = tiny_images(size=(16, 16))
    assert_same(model.encode(images).tokens, vit.forward_features(images))
    data = recorded_data(tmp_path / file)
    assert data is not None
    assert data.mean == (0.5, 0.5, 0.5)
    assert timm_provenance(tmp_path).license == "apache-2.0"


@pytest.mark.parametrize(
    ("changes", "tokens", "positions"),
    [
        ({"class_token": True, "global_pool": "token"}, "cls_token", 1),
        ({"reg_tokens": 2}, "reg_token", 2),
        ({"class_token": True, "reg_tokens": 4, "no_embed_class": True}, "cls_token, reg_token", 0),
    ],
)
def test_tokens_beside_the_patches_are_refused_or_left_out_and_listed(changes, tokens, positions, caplog):
    vit = tiny_vit(**changes)
    with pytest.raises(CheckpointError, match=rf"{tokens}.*would not be its own.*model\.init"):
        from_timm(vit, "timm")
    with caplog.at_level(logging.INFO):
        model = from_timm(vit, "timm", drop_prefix_tokens=True)
    assert f"left out of timm: {tokens}" in caplog.text
    own = positions_of(model.encoder)
    assert torch.equal(own, vit.pos_embed[:, positions:])
    bare = read_timm_weights(vit.state_dict(), "file", num_heads=3, drop_prefix_tokens=True)
    assert torch.equal(positions_of(bare.encoder), own)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, r"attn\.k_norm is LayerNorm"),
        ({"scale_mlp_norm": True}, r"mlp\.norm is LayerNorm"),
        ({"pre_norm": True}, "norm_pre is LayerNorm"),
        ({"final_norm": False}, "norm is Identity"),
        ({"pos_embed": "none"}, "lacks 'pos_embed'"),
        ({"act_layer": "gelu_tanh"}, r"mlp\.act is GELUTanh\(\), here GELU"),
        (
            {"norm_layer": "layernorm", "embed_norm_layer": "layernormfp32"},
            r"patch_embed\.norm is LayerNormFp32",
        ),
        ({"mlp_layer": timm.layers.SwiGLU}, r"blocks\.0\.mlp is SwiGLU"),
        ({"attn_layer": "diff"}, "attn is DiffAttention"),
        ({"block_fn": ResPostBlock}, "timm ResPostBlock"),
        ({"patch_size": (4, 8)}, "must be square"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused_by_name(changes, words):
    with pytest.raises(CheckpointError, match=words):
        from_timm(tiny_vit(**changes), "timm")


def test_names_of_timm_are_read_and_others_refused(monkeypatch):
    fresh = "timm:test_vit,pretrained=false"
    with pytest.raises(CheckpointError, match="cls_token"):
        load(fresh)
    model = from_timm(timm_model(fresh), fresh, drop_prefix_tokens=True)
    assert model.config.embed_dim == timm.create_model("test_vit").embed_dim
    data = read_timm_data(f"{fresh},img_size=80")
    assert data is not None
    assert (data.std, data.val_resize_px) == ((0.5, 0.5, 0.5), 84)
    assert timm_provenance("timm:test_vit.r160_in1k").origin == "timm's test_vit.r160_in1k"
    with pytest.raises(CheckpointError, match="timm ResNet; only its VisionTransformer"):
        load("timm:test_resnet,pretrained=false")
    with pytest.raises(ValueError, match="timm has no model 'tst_vit'; did you mean 'test_vit'"):
        load("timm:tst_vit")
    with pytest.raises(ValueError, match="cannot read 'size=3'"):
        load("timm:test_vit,size=3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the cache"):
        load("timm:test_vit.r160_in1k")


# --------------------------------------------------------------------------------------- bare state dicts


def test_a_bare_state_dict_is_the_same_function_and_needs_its_heads(tmp_path, caplog):
    vit = tiny_vit(init_values=0.3)
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.bin")
    with pytest.raises(CheckpointError, match=r"how many attention heads .*24 wide, 2 layers.*num_heads="):
        load(tmp_path / "vit.bin")
    images = tiny_images(size=(16, 16))
    model = load(tmp_path / "vit.bin", num_heads=3)
    assert isinstance(model, NextBlockModel)
    assert_same(model.encode(images).tokens, vit.forward_features(images))
    assert "no mask recorded; loaded as a timm ViT with full attention" in caplog.text
    official = tiny_vit(embed_dim=192, depth=12)
    assert read_timm_weights(official.state_dict(), "vit.pth").config.num_heads == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token": torch.zeros(1, 24)}, "unexpected: mask_token"),
        ({"norm.weight": None}, r"lacks 'norm\.weight'"),
        ({"pos_embed": torch.zeros(1, 15, 24)}, "no square grid"),
        ({"blocks.1.norm1.bias": None}, r"missing: blocks\.1\.norm1\.bias"),
        ({"blocks.1.mlp.fc2.bias": None}, r"missing: blocks\.1\.mlp\.fc2\.bias"),
        (
            {"blocks.0.ls1.gamma": torch.ones(24), "blocks.0.attn.proj.weight": None},
            r"unexpected: blocks\.0\.ls1",
        ),
        ({"blocks.0.ls1.gamma": torch.ones(7)}, r"unexpected: blocks\.0\.ls1"),
        ({"patch_embed.proj.weight": torch.zeros(24, 48)}, r"of shape \(24, 48\), not of 4"),
        ({"norm.bias": torch.full((24,), torch.inf)}, r"NaN or inf \(norm\.bias\)"),
        ({"epoch": 3}, r"holds 'epoch' of type int"),
    ],
)
def test_a_state_dict_that_is_no_encoder_of_this_kind_is_refused(changes, words, tmp_path):
    weights = {**tiny_vit().state_dict(), **changes}
    torch.save({name: t for name, t in weights.items() if t is not None}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=words):
        read_timm(tmp_path / "vit.pth", LoadOptions(num_heads=3, drop_prefix_tokens=True))


# ------------------------------------------------------------ our own encoders, of which the mask is a part


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_weight_file_alone_is_the_encoder_of_its_directory(kind, tmp_path):
    model, images = encoder(CONFIGS[kind]), tiny_images()
    directory = written(model, tmp_path / "out")
    shutil.copy(directory / "model.safetensors", tmp_path / "alone.safetensors")
    pickled = tmp_path / "pickled"  # has no metadata, but the settings lie beside it
    pickled.mkdir()
    shutil.copy(directory / "config.json", pickled)
    torch.save(model.encoder.state_dict(), pickled / "pytorch_model.bin")
    for src in ("out", "out/model.safetensors", "alone.safetensors", "pickled", "pickled/pytorch_model.bin"):
        found = load(tmp_path / src)
        assert isinstance(found, NextBlockModel)
        assert found.config == model.config
        assert torch.equal(found.encode(images).tokens, model.encode(images).tokens)
    assert recorded_data(tmp_path / "alone.safetensors") == DATA


def test_a_masked_model_that_timm_saved_comes_back_with_its_mask(tmp_path):
    vit = opened(written(encoder(XTRA), tmp_path / "out"), num_classes=3)
    save_for_hf(
        vit,
        tmp_path / "tuned",
        model_args=json.loads((tmp_path / "out/config.json").read_text())["model_args"],
    )
    found = load(tmp_path / "tuned")
    assert isinstance(found, NextBlockModel)
    assert torch.equal(found.encode(tiny_images()).tokens, vit.forward_features(tiny_images()))


OWN = {"format_version": 1, "model": to_dict(XTRA)}
FULL = {"format_version": 1, "model": to_dict(replace(XTRA, feature_attention="full"))}
DIFFERENT = "describe different encoders.*nextblock_vit with attention causal"


@pytest.mark.parametrize(
    ("config", "metadata", "words"),
    [
        ("{", OWN, r"config\.json is no JSON"),  # all of these would be opened under full attention, or not
        ("[]", OWN, r"config\.json holds a list"),
        ({"nextblock": FULL}, OWN, DIFFERENT),
        ({"architecture": "vit_base_patch16_224"}, OWN, DIFFERENT),
        ({"architecture": "vit_base_patch16_224"}, None, DIFFERENT),
        ({"model_args": {"attention": "full"}}, OWN, DIFFERENT),
        ({"model_args": [1]}, OWN, r"config\.json is damaged: model_args is a list"),
        ({"nextblock": {"model": {"sides": 3}}}, None, '"nextblock" of .* are damaged'),
        ({"nextblock": {**OWN, "model": {"sides": 3}}}, None, "are damaged .unknown setting 'sides'"),
        ({}, {**OWN, "format_version": 9}, "format version 9, this release reads up to 1; upgrade"),
        ({}, "{", '"nextblock" of .* are damaged'),
    ],
)
def test_damaged_and_contradicting_settings_are_refused(config, metadata, words, tmp_path):
    directory = written(encoder(XTRA), tmp_path / "out")
    weights = load_file(directory / "model.safetensors")
    told = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(weights, directory / "model.safetensors", {"nextblock": told} if metadata else None)
    if isinstance(config, str):
        (directory / "config.json").write_text(config)
    else:
        changed_json(directory / "config.json", **config)
    for src in (directory, directory / "model.safetensors"):
        with pytest.raises(CheckpointError, match=words):
            load(src)
    with pytest.raises(CheckpointError, match=words):  # timm itself opens some of them as another encoder
        open_timm_encoder(f"timm:local-dir:{directory}")


def test_damaged_missing_and_strange_weights_are_refused(tmp_path):
    directory = written(encoder(XTRA), tmp_path / "out")
    file = directory / "model.safetensors"
    with pytest.raises(CheckpointError, match="holds a nextblock_vit with attention causal; give the file"):
        timm_model(f"timm:vit_tiny_patch16_224,checkpoint={file}")
    whole, weights = file.read_bytes(), {name: w.clone() for name, w in load_file(file).items()}
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not complete"):
        load(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no weights beside its config\.json: looked for model"):
        load(directory)
    del weights["norm.bias"]
    (directory / "config.json").write_text('{"architectures": ["ViTModel"]}')  # not timm's
    assert not is_timm_directory(directory)
    saved_by_timm(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias\n"):
        read_timm(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "vit_of_tomorrow"}, r"Unknown model .vit_of_tomorrow.*upgrade timm"),
        ({"model_args": {**PLAIN, "depth": "two"}}, "timm cannot give"),
        (
            {"pretrained_cfg": {"mean": [0.5], "std": [0.5], "crop_pct": 0, "input_size": [3, 16, 16]}},
            "damaged mean",
        ),
    ],
)
def test_settings_that_timm_cannot_use_are_refused(changes, words, tmp_path):
    saved_by_timm(tmp_path)
    changed_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        read_timm(tmp_path)
        read_timm_data(tmp_path)


# --------------------------------------------------------------------------------------- what loading leaves


def test_files_are_checked_in_several_threads_and_the_process_stays_as_it_was(tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    kept = {name: t for name, t in weights.items() if name != "norm.weight"}
    nan = {**weights, "norm.weight": torch.full((64,), torch.nan)}
    for name, some in {"whole": weights, "cut": kept, "nan": nan}.items():
        torch.save(some, tmp_path / f"{name}.pth")
    plain, random = torch.nn.Module.load_state_dict, torch.get_rng_state()

    def refusal(name):
        try:
            open_timm_encoder(f"timm:test_vit,checkpoint={tmp_path / name}.pth")
        except CheckpointError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        whole, cut, bad = (list(pool.map(refusal, [name] * 4)) for name in ("whole", "cut", "nan"))
    assert whole == [""] * 4
    assert all("do not fit that model: norm.weight" in words for words in cut)
    assert all("NaN or inf (norm.weight)" in words for words in bad)
    saved_by_timm(tmp_path / "vit")
    load(tmp_path / "vit")
    assert torch.nn.Module.load_state_dict is plain
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit3", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"]
)
def test_a_head_that_is_taken_off_leaves_what_timm_builds_without_one(name):
    with torch.device("meta"):
        model: Any = timm.create_model(name)
        model.reset_classifier(0)
        assert str(model) == str(timm.create_model(name, num_classes=0))
