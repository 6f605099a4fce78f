"""Official XTRA files: what their settings mean, and what is refused by name."""

import re
from typing import Any

import pytest
import torch

from nextblock.checkpoint import CheckpointError
from nextblock.interop import load
from toy import tiny_images

UNFUSED = {f"{part}_{name}": value for part in ("enc", "predictor") for name, value in
           (("qk_scale", 0.5), ("fused_attn", False))}  # fmt: skip
RANDOM = {"aim_pseudo_random": True, "seed": 3}
CAUSAL = {"enc_is_block_causal": False, "enc_is_causal": True}
CAUSAL |= {"predictor_is_block_causal": False, "predictor_is_causal": True}
SIZES = {"image_size": 64, "patch_size": 8, "block_size": 2, "embed_dim": 48, "depth": 4, "mlp_ratio": 4.0}
SIZES |= {"projection_dim": 96, "predictor_dim": 36, "block_mlp_dim": 128, "predictor_depth": 2}
SIZES |= {"num_heads": 3, "predictor_heads": 3, "num_predicted_blocks": 1}
IMAGES = tiny_images(size=(64, 64))


@pytest.fixture
def load_changed(golden_dir, tmp_path):
    """Load an official file after a change of its settings and tensors (None: left out)."""

    def save_and_load(name="xtra_k2", tensors=(), num_heads: int | None = 3, **settings) -> Any:
        content = torch.load(golden_dir / f"{name}.ckpt", weights_only=True)
        weights = {**content["state_dict"], **dict(tensors)}
        content["state_dict"] = {key: tensor for key, tensor in weights.items() if tensor is not None}
        content["hyper_parameters"] = {**content["hyper_parameters"], **settings}
        torch.save(content, tmp_path / "official.ckpt")
        return load(tmp_path / "official.ckpt", num_heads=num_heads)

    return save_and_load


def mask(attention, block_size=None):
    return {"predictor_attention": attention, "predictor_block_size": block_size}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {**SIZES, "resample_antialias": False, **mask("native")}),
        ({"name": "causal_k1"}, {"block_size": 1}),  # though enc_block_size says 2
        ({"num_heads": None, "enc_arch": "vit_tiny"}, {"num_heads": 3}),
        ({"num_heads": None, "enc_arch": "vit_base"}, {"num_heads": 12}),
        ({"num_heads": None, "enc_arch": "vit_huge"}, {"num_heads": 16}),
        ({"num_heads": 6, "enc_arch": "vit_huge"}, {"num_heads": 6}),
        ({"predictor_block_size": 4}, mask("block_causal", 4)),
        ({"predictor_block_size": 1}, mask("causal")),
        ({"predictor_is_block_causal": False, "predictor_is_causal": True}, mask("causal")),
        ({"predictor_is_block_causal": None}, mask("full")),
        ({"predictor_is_block_causal": False, "predictor_block_size": 4}, mask("full")),
        ({"name": "causal_k1", **CAUSAL}, {"block_size": 1, **mask("native")}),
        ({"enc_img_size": [32, 128]}, {"image_size": (32, 128)}),
        ({"enc_img_size": [256]}, {"image_size": 64}),  # the positions contradict it
        (RANDOM, {"order": "random", "order_seed": 3}),
        ({"aim_l1_loss": True}, {"loss": "l1"}),
        ({"aim_norm_pix_loss": None}, {"norm_pixels": False}),
        ({"predictor_num_heads": None}, {"predictor_heads": 12}),
        ({"enc_qk_scale": 0.5, "predictor_qk_scale": 0.5}, {"qk_scale": None}),  # fused attention has its own
        (UNFUSED, {"qk_scale": 0.5}),
    ],
)
def test_settings_are_read_or_have_the_official_default(settings, expected, load_changed):
    config = load_changed(**settings).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_an_encoder_alone_encodes_with_its_mask_or_none_and_refuses_to_predict(golden_dir, load_changed):
    names = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)["state_dict"]
    no_predictor = {name: None for name in names if not name.startswith("enc.")}
    causal = load_changed(tensors=no_predictor)
    full = load_changed(tensors=no_predictor, enc_is_block_causal=False)
    assert torch.equal(causal.encode(IMAGES).tokens, load_changed().encode(IMAGES).tokens)
    with pytest.raises(ValueError, match="cannot predict"):
        causal(IMAGES)
    assert (full.config.feature_attention, full.config.block_size) == ("full", 1)
    assert torch.equal(full.encode(IMAGES).tokens, causal.encode(IMAGES, attention="full").tokens)


@torch.no_grad()
def test_an_attentive_heads_scale_of_the_scores_is_honoured(load_changed):
    plain = load_changed("attentive_probe")
    before = plain(IMAGES)
    scaled = load_changed("attentive_probe", attentive_pooling_qk_scale=0.7)
    plain.head.key.weight *= 0.7 * 12**0.5  # scores s q·k are those of keys s sqrt(width) times as long
    torch.testing.assert_close(scaled(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-5)
    assert (scaled(IMAGES) - before).abs().max() > 1e-3


def test_a_head_without_batch_norm_and_bias_is_built_without(golden_dir, load_changed):
    weights = torch.load(golden_dir / "linear_probe.ckpt", weights_only=True)["state_dict"]
    of_head = [name for name in weights if name.startswith("classifier.")]
    (kept,) = (name for name in of_head if name.endswith("weight"))
    classifier = load_changed("linear_probe", dict.fromkeys(of_head) | {kept: weights[kept]})
    torch.testing.assert_close(classifier(IMAGES), classifier.features(IMAGES) @ weights[kept].T)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("xtra_k2", {"enc_use_out_norm": False}, "enc_use_out_norm is False, only True is known"),
        ("xtra_k2", {"proj_in_bn": True}, "proj_in_bn is True"),
        ("xtra_k2", {"proj_nlayers": 1}, "proj_nlayers is 1, only 2 is known"),
        ("xtra_k2", {"aim_proj_out_bn": True}, "aim_proj_out_bn is True"),
        ("xtra_k2", {"enc_is_block_causal": False}, "neither enc_is_block_causal nor enc_is_causal"),
        ("xtra_k2", {**UNFUSED, "enc_qk_scale": None}, "predictor_qk_scale is not enc_qk_scale"),
        ("xtra_k2", {**RANDOM, "predictor_block_size": 4}, "under aim_pseudo_random"),
        ("attentive_probe", {"attentive_pooling_qkv_bias": True}, "attentive_pooling_qkv_bias is True"),
        ("linear_probe", {"cls_avgpool_patchtokens": None}, "cls_avgpool_patchtokens is not set"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused(name, settings, words, load_changed):
    with pytest.raises(CheckpointError, match="of a kind that is not implemented: .*" + re.escape(words)):
        load_changed(name, **settings)


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"enc-1.weight": ONE}, "holds 'enc-1.weight', which is not in the XTRA layout"),
        ({"an.enc.norm.bias": ONE}, "holds 'an.enc.norm.bias', which is not in"),
        ({"classifier.bn.x": ONE, "classifier.0.x": ONE}, "holds 'classifier.0.x', which is not in"),
        ({"proj.mlp.0.weight": None}, "lacks 'predictor.projection.0.weight'"),
        ({"predictor.blocks.0.mlp.fc2.weight": None}, "lacks 'predictor.blocks.0.mlp.fc2.weight'"),
        ({"enc.norm.bias": None}, "missing: encoder.norm.bias"),
        ({"enc.cls_token": ONE}, "unexpected: encoder.cls_token"),
        ({"enc.norm.bias": torch.zeros(5)}, "(5,) in the file, (48,)"),
        ({"enc.patch_embed.proj.weight": torch.zeros(4, 4)}, "of shape (4, 4), not of 4 axes"),
        ({"enc.norm.bias": "none"}, "holds 'enc.norm.bias' of type str"),
        ({"enc.pos_embed": torch.zeros(3)}, "holds encoder.pos_embed of shape (3,)"),
        ({"enc.norm.bias": torch.full((48,), torch.inf)}, "NaN or inf in 1 tensor (encoder.norm.bias)"),
    ],
)
def test_weights_damaged_or_not_whole_are_refused_by_name(tensors, words, load_changed):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_changed(tensors=tensors)


@pytest.mark.parametrize("told", [None, "all"])
def test_weights_without_their_settings_are_refused(told, golden_dir, tmp_path):
    content = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
    torch.save({**content, "hyper_parameters": told}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"without hyper_parameters, .*; give the original checkpoint"):
        load(tmp_path / "x.ckpt", num_heads=3)


def test_a_number_of_heads_is_asked_for_and_one_that_cannot_be_is_wrong_usage_or_damage(load_changed):
    with pytest.raises(CheckpointError, match="give them: num_heads="):
        load_changed(num_heads=None)
    with pytest.raises(ValueError, match=r"embed_dim 48 is not divisible by model\.num_heads 5"):
        load_changed(num_heads=5)
    with pytest.raises(CheckpointError, match=r"damaged.*not divisible by model\.num_heads 5"):
        load_changed(num_heads=None, enc_num_heads=5)
