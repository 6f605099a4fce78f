"""timm's models and directories as encoders here: the same function, or refused by name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from nextblock.checkpoint import CheckpointError
from nextblock.evaluate.features import seeded
from nextblock.interop.hub import HubError
from nextblock.interop.timm_format import (
    is_timm_directory,
    is_timm_weights,
    read_timm,
    read_timm_data,
    read_timm_weights,
    timm_provenance,
)
from nextblock.interop.timm_weights import from_timm
from nextblock.models.encoder import positions_of
from test_interop_timm import TINY_VIT, XTRA, assert_same, encoder, written
from toy import tiny_images

# --------------------------------------------------------------------------------------------------------- in


def tiny_vit(**changes) -> Any:
    """A timm ViT with random weights, LayerScale's included."""
    with seeded(1):
        vit = VisionTransformer(
            **{**TINY_VIT, "class_token": False, "global_pool": "avg", "fc_norm": False, **changes}
        ).eval()
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return vit


EXACT = {
    "plain": {},
    "LayerScale": {"init_values": 0.5},
    "LayerScale without bias": {"init_values": 0.5, "proj_bias": False, "qkv_bias": False},
    "bias in some maps": {"qkv_bias": False},
    "patch norm": {"embed_norm_layer": "layernorm"},
    "oblong": {"img_size": (16, 24)},
    "odd MLP": {"mlp_ratio": 48 / 11},
    "a head": {"num_classes": 7},
    "a head that pools by attention": {"global_pool": "map"},
}


@pytest.mark.parametrize("name", EXACT)
def test_a_timm_vit_without_class_token_is_the_same_function(name):
    vit = tiny_vit(**EXACT[name])
    images = tiny_images(size=vit.patch_embed.img_size)
    model = from_timm(vit, None, "timm")
    encoded = model.encode(images)
    assert_same(encoded.tokens, vit.forward_features(images))
    for found, layer in zip(
        encoded.layers, vit.forward_intermediates(images, output_fmt="NLC")[1], strict=True
    ):
        assert_same(found, layer)


def saved_by_timm(directory, **changes) -> Any:
    """A directory as timm's users write it."""
    args = {**TINY_VIT, "class_token": False, "global_pool": "avg", "fc_norm": False, **changes}
    with seeded(2):
        vit = timm.create_model("vit_base_patch16_224", **args).eval()
    save_for_hf(vit, directory, model_args=args, safe_serialization=True)
    return vit


def test_a_directory_that_timm_wrote_is_read(tmp_path):
    vit = saved_by_timm(tmp_path, num_classes=7, init_values=0.1)
    model = read_timm(tmp_path)
    images = tiny_images(size=(16, 16))
    assert model.config.feature_attention == "full"
    assert_same(model.encode(images).tokens, vit.forward_features(images))
    data = read_timm_data(tmp_path)
    assert data is not None
    assert data.mean == (0.5, 0.5, 0.5)
    assert timm_provenance(tmp_path).license == "apache-2.0"


def test_weights_that_do_not_fit_the_named_architecture_are_refused_by_name(tmp_path):
    saved_by_timm(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    moved = weights.pop("blocks.1.norm2.bias")
    weights["pos_embed"] = weights["pos_embed"][:, :4].contiguous()
    save_file({**weights, "stranger": moved}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_timm(tmp_path)
    for told in ("missing: blocks.1.norm2.bias", "unexpected: stranger", "shape of pos_embed: (1, 4, 24)"):
        assert told in str(caught.value)


TOKENS = {
    "class": ({"class_token": True, "global_pool": "token"}, ["cls_token"], 1),
    "registers": ({"reg_tokens": 2}, ["reg_token"], 2),
    "both, without positions": (
        {"class_token": True, "reg_tokens": 4, "no_embed_class": True},
        ["cls_token", "reg_token"],
        0,
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_beside_the_patches_are_refused_or_left_out_and_listed(name, caplog):
    changes, tokens, positions = TOKENS[name]
    vit = tiny_vit(**changes)
    with pytest.raises(CheckpointError, match=rf"{', '.join(tokens)}.*would not be its own.*model\.init"):
        from_timm(vit, None, "timm")
    with caplog.at_level(logging.INFO):
        model = from_timm(vit, None, "timm", drop_prefix_tokens=True)
    assert f"left out of timm: {', '.join(tokens)}" in caplog.text
    own = positions_of(model.encoder)
    assert torch.equal(own, vit.pos_embed[:, positions:])
    bare = read_timm_weights(vit.state_dict(), "file", num_heads=3, drop_prefix_tokens=True)
    assert torch.equal(positions_of(bare.encoder), own)


OTHERS = {
    "qk_norm": ({"qk_norm": True}, "normed queries and keys"),
    "scale_attn_norm": ({"scale_attn_norm": True}, "a norm in its attention"),
    "scale_mlp_norm": ({"scale_mlp_norm": True}, "a norm in its MLP"),
    "pre_norm": ({"pre_norm": True}, "a norm before its first layer.*|without bias"),
    "final_norm": ({"final_norm": False}, "no final norm on its tokens"),
    "fc_norm": ({"fc_norm": True}, "no final norm on its tokens"),
    "pos_embed": ({"pos_embed": "none"}, "no absolute positions"),
    "act_layer": ({"act_layer": "quick_gelu"}, "another activation than GELU"),
    "tanh": ({"act_layer": "gelu_tanh"}, "another activation than GELU"),
    "norm_layer": ({"norm_layer": "rmsnorm"}, "norms that are no LayerNorm"),
    "mlp_layer": ({"mlp_layer": timm.layers.SwiGLU}, "an MLP of another kind .SwiGLU"),
    "attn_layer": ({"attn_layer": "diff"}, "attention of another kind"),
    "block_fn": (
        {"block_fn": timm.models.vision_transformer.ResPostBlock},
        "layers of another kind .ResPostBlock",
    ),
    "patch_size": ({"patch_size": (4, 8)}, "not square"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_encoder_cannot_do_is_refused_by_name(name):
    changes, told = OTHERS[name]
    with pytest.raises(CheckpointError, match=f"it has .*({told})"):
        from_timm(tiny_vit(**changes), None, "timm")


def test_models_of_another_class_are_refused_with_its_name():
    with pytest.raises(CheckpointError, match="timm ResNet; only its VisionTransformer"):
        read_timm("timm:test_resnet,pretrained=false")


def test_a_name_of_timm_is_read_without_weights():
    with pytest.raises(CheckpointError, match="cls_token"):
        read_timm("timm:test_vit,pretrained=false")
    model = read_timm("timm:test_vit,pretrained=false", drop_prefix_tokens=True)
    assert model.config.embed_dim == timm.create_model("test_vit").embed_dim
    data = read_timm_data("timm:test_vit")
    assert data is not None
    assert data.std == (0.5, 0.5, 0.5)
    assert timm_provenance("timm:test_vit.r160_in1k").origin == "timm's test_vit.r160_in1k"


def test_names_and_options_that_timm_does_not_have_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="timm has no model 'tst_vit'; did you mean 'test_vit'"):
        read_timm("timm:tst_vit")
    with pytest.raises(ValueError, match="cannot read 'size=3'"):
        read_timm("timm:test_vit,size=3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the cache"):
        read_timm("timm:test_vit.r160_in1k")


# ---------------------------------------------------------------------------------------- bare state dicts


def test_a_bare_state_dict_is_the_same_function_and_needs_its_heads():
    vit = tiny_vit(init_values=0.3)
    weights = vit.state_dict()
    assert is_timm_weights(weights)
    assert not is_timm_weights({f"encoder.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(CheckpointError, match=r"how many attention heads .*24 wide, 2 layers.*num_heads="):
        read_timm_weights(weights, "vit.pth")
    images = tiny_images(size=(16, 16))
    model = read_timm_weights(weights, "vit.pth", num_heads=3)
    assert_same(model.encode(images).tokens, vit.forward_features(images))


def test_an_official_size_tells_its_heads():
    vit = tiny_vit(embed_dim=192, depth=12, num_heads=3)
    assert read_timm_weights(vit.state_dict(), "vit.pth").config.num_heads == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mask_token": torch.zeros(1, 24)}, "unexpected: encoder.mask_token"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, "unexpected: encoder.blocks.0.attn.q_norm.weight"),
        ({"norm.weight": None}, "no final norm"),
        ({"pos_embed": None}, "no pos_embed"),
        ({"pos_embed": torch.zeros(1, 15, 24)}, "no square grid"),
        ({"blocks.1.norm1.bias": None}, "missing: encoder.blocks.1.norm1.bias"),
        ({"blocks.1.mlp.fc2.bias": None}, r"missing: blocks\.1\.mlp\.fc2\.bias .other layers have it"),
        ({"blocks.0.ls1.gamma": torch.ones(24), "blocks.0.attn.proj.weight": None}, "lacks 'blocks.0.attn"),
        ({"patch_embed.proj.weight": torch.zeros(24, 48)}, r"of shape \(24, 48\); only convolutions"),
        (
            {"pos_embed": torch.zeros(1, 81, 24), "reg_token": torch.zeros(1, 17, 24)},
            "81 and 64 patches would",
        ),
    ],
)
def test_a_state_dict_that_is_no_encoder_of_this_kind_is_refused(changes, told):
    weights = {**tiny_vit().state_dict(), **changes}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=told):
        read_timm_weights(weights, "vit.pth", num_heads=3, drop_prefix_tokens=True)


def test_a_map_that_has_no_bias_in_any_layer_gets_zeros():
    weights = tiny_vit(qkv_bias=False).state_dict()
    assert (
        not read_timm_weights(weights, "vit.pth", num_heads=3)
        .get_parameter("encoder.blocks.1.attn.qkv.bias")
        .any()
    )


# ------------------------------------------------------------------------------------------ bad directories


def test_directories_without_weights_or_of_a_newer_format_are_refused(tmp_path):
    directory = written(encoder(XTRA), tmp_path / "out")
    config = json.loads((directory / "config.json").read_text())
    config["nextblock"]["format_version"] = 9
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format version 9, this release reads up to 1; upgrade"):
        read_timm(directory)
    del config["nextblock"]["format_version"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks format_version or model"):
        read_timm(directory)
    written(encoder(XTRA), directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a weight file"):
        read_timm(directory)
    weights.unlink()
    with pytest.raises(
        CheckpointError, match=r"no weights beside its config\.json: looked for model\.safetensors"
    ):
        read_timm(directory)


def test_an_architecture_that_timm_does_not_have_is_refused(tmp_path):
    saved_by_timm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "vit_of_tomorrow"}))
    with pytest.raises(CheckpointError, match=r"Unknown model .vit_of_tomorrow.*upgrade timm"):
        read_timm(tmp_path)


@pytest.mark.parametrize("content", [None, '{"architectures": ["ViTModel"]}'])
def test_other_directories_are_not_taken_for_timms(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert not is_timm_directory(tmp_path)
