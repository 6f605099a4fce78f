"""Official XTRA files: what their settings mean, and what is refused by name."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from nextblock.checkpoint import CheckpointError
from nextblock.interop import load
from nextblock.interop.names import ratio_of, renamed
from nextblock.models.heads import ImageClassifier
from test_checkpoint import same_weights
from toy import tiny_images

UNFUSED = {f"{part}_{name}": value for part in ("enc", "predictor") for name, value in
           (("qk_scale", 0.5), ("fused_attn", False))}  # fmt: skip
IMAGES = tiny_images(size=(64, 64))


@pytest.fixture
def official(golden_dir):
    """The content of an official Lightning file, to be changed and saved."""
    return torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)


@pytest.fixture
def probe(golden_dir):
    """The same of an official attentive classifier."""
    return torch.load(golden_dir / "attentive_probe.ckpt", weights_only=True)


@pytest.fixture
def load_content(tmp_path):
    """Save as a pickle and load, with the golden files' number of heads."""

    def save_and_load(content, num_heads=3, **settings):
        content["hyper_parameters"].update(settings)
        torch.save(content, tmp_path / "official.ckpt")
        return load(tmp_path / "official.ckpt", num_heads=num_heads)

    return save_and_load


def only_encoder(content):
    weights = {name: w for name, w in content["state_dict"].items() if name.startswith("enc.")}
    return {**content, "state_dict": weights}


# --------------------------------------------------------------------------------------------------- settings


def test_the_deepspeed_layout_gives_the_same_model(official, load_content):
    deepspeed = {"module": official["state_dict"], "hyper_parameters": official["hyper_parameters"], "dp": 72}
    assert same_weights(load_content(deepspeed), load_content(official))


@pytest.mark.parametrize(("arch", "heads"), [("vit_tiny", 3), ("vit_base", 12), ("vit_huge", 16)])
def test_the_architectures_name_tells_the_heads_unless_the_caller_does(arch, heads, official, load_content):
    assert load_content(official, num_heads=None, enc_arch=arch).config.num_heads == heads
    assert load_content(official, num_heads=6, enc_arch=arch).config.num_heads == 6


def test_an_encoder_alone_encodes_and_refuses_to_predict(official, load_content):
    whole, model = load_content(official), load_content(only_encoder(official))
    assert torch.equal(model.encode(IMAGES).tokens, whole.encode(IMAGES).tokens)
    with pytest.raises(ValueError, match="cannot predict"):
        model(IMAGES)


def test_an_encoder_without_a_mask_has_full_attention(official, load_content):
    causal = load_content(only_encoder(official))
    model = load_content(only_encoder(official), enc_is_block_causal=False)
    assert (model.config.feature_attention, model.config.block_size) == ("full", 1)
    assert torch.equal(model.encode(IMAGES).tokens, causal.encode(IMAGES, attention="full").tokens)


@pytest.mark.parametrize(
    ("settings", "attention", "block_size"),
    [
        ({}, "native", None),
        ({"predictor_block_size": 4}, "block_causal", 4),
        ({"predictor_block_size": 1}, "causal", None),
        ({"predictor_is_block_causal": False, "predictor_is_causal": True}, "causal", None),
        ({"predictor_is_block_causal": None}, "full", None),
        ({"predictor_is_block_causal": False, "predictor_block_size": 4}, "full", None),
        (
            {"enc_is_block_causal": False, "enc_is_causal": True, "predictor_is_block_causal": False,
             "predictor_is_causal": True}, "native", None,
        ),
    ],
)  # fmt: skip
def test_a_predictor_has_a_mask_of_its_own(
    settings, attention, block_size, official, golden_dir, load_content
):
    if settings.get("enc_is_causal"):
        official = torch.load(golden_dir / "causal_k1.ckpt", weights_only=True)
    config = load_content(official, **settings).config
    assert (config.predictor_attention, config.predictor_block_size) == (attention, block_size)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"enc_img_size": [32, 128]}, "image_size", (32, 128)),
        ({"enc_img_size": [256]}, "image_size", 64),  # the positions contradict it
        ({"aim_pseudo_random": True, "seed": 3}, "order", "random"),
        ({"aim_pseudo_random": True, "seed": 3}, "order_seed", 3),
        ({"aim_l1_loss": True}, "loss", "l1"),
        ({"aim_norm_pix_loss": None}, "norm_pixels", False),
        ({"predictor_num_heads": None}, "predictor_heads", 12),
        ({}, "resample_antialias", False),  # as officially
        ({"enc_qk_scale": 0.5, "predictor_qk_scale": 0.5}, "qk_scale", None),  # fused attention has its own
        (UNFUSED, "qk_scale", 0.5),
    ],
)
def test_settings_are_read_and_absent_ones_have_the_official_default(
    settings, name, value, official, load_content
):
    assert getattr(load_content(official, **settings).config, name) == value


# ------------------------------------------------------------------------------------------------ classifiers


def test_an_attentive_heads_scale_of_the_scores_is_honoured(probe, load_content):
    plain, scaled = load_content(probe), load_content(probe, attentive_pooling_qk_scale=0.7)
    assert isinstance(scaled, ImageClassifier)
    tokens, heads = plain.features(IMAGES).double(), 4
    normed = plain.head.norm.double()(tokens.transpose(1, 2))  # what the scale means, written out
    weights = {name: w.double() for name, w in probe["state_dict"].items()}
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # noqa: E731
    query = split(weights["classifier.cls_token"])
    key, value = (split(normed.transpose(1, 2) @ weights[f"classifier.{n}.weight"].T) for n in "kv")
    mixed = ((query @ key.transpose(-2, -1)) * 0.7).softmax(-1) @ value
    pooled = mixed.transpose(1, 2).flatten(-2).mean(1)
    expected = pooled @ weights["classifier.linear.weight"].T + weights["classifier.linear.bias"]
    torch.testing.assert_close(scaled(IMAGES).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_head_without_batch_norm_and_bias_is_built_without(golden_dir, load_content):
    content = torch.load(golden_dir / "linear_probe.ckpt", weights_only=True)
    weights = content["state_dict"]
    for name in [n for n in weights if n.startswith("classifier.") and not n.endswith("weight")]:
        del weights[name]
    classifier = load_content(content)
    (weight,) = (w for n, w in weights.items() if n.startswith("classifier."))
    torch.testing.assert_close(classifier(IMAGES), classifier.features(IMAGES) @ weight.T)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"enc_use_out_norm": False}, "enc_use_out_norm is False, only True is known"),
        ({"proj_in_bn": True}, "proj_in_bn is True"),
        ({"proj_nlayers": 1}, "proj_nlayers is 1, only 2 is known"),
        ({"aim_proj_out_bn": True}, "aim_proj_out_bn is True"),
        ({"enc_is_block_causal": False}, "neither enc_is_block_causal nor enc_is_causal"),
        (
            {"predictor_qk_scale": 0.5, "predictor_fused_attn": False},
            "predictor_qk_scale is not enc_qk_scale",
        ),
        ({"predictor_block_size": 4, "aim_pseudo_random": True}, "under aim_pseudo_random"),
    ],
)
def test_a_setting_that_changes_the_function_and_is_not_implemented_is_refused(
    settings, words, official, load_content
):
    with pytest.raises(CheckpointError, match="of a kind that is not implemented: .*" + re.escape(words)):
        load_content(official, **settings)


def test_a_classifier_that_is_not_implemented_is_refused(golden_dir, probe, load_content):
    with pytest.raises(CheckpointError, match="attentive_pooling_qkv_bias is True"):
        load_content(probe, attentive_pooling_qkv_bias=True)
    linear = torch.load(golden_dir / "linear_probe.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="cls_avgpool_patchtokens is not set"):
        load_content(linear, cls_avgpool_patchtokens=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("proj.mlp.0.weight"), "lacks 'proj.mlp.0.weight'"),
        (lambda w: w.pop("predictor.blocks.0.mlp.fc1.weight"), "lacks 'predictor.blocks.0.mlp.fc1.weight'"),
        (lambda w: w.pop("enc.norm.bias"), "missing: encoder.norm.bias"),
        (lambda w: w.update({"enc.cls_token": torch.zeros(1)}), "unexpected: encoder.cls_token"),
        (lambda w: w.update({"momentum.x": torch.zeros(1)}), "holds 'momentum.x'"),
        (lambda w: w.update({"enc.norm.bias": torch.zeros(5)}), "(5,) in the file, (48,)"),
        (
            lambda w: w.update({"enc.patch_embed.proj.weight": torch.zeros(4, 4)}),
            "of shape (4, 4), not of 4 axes",
        ),
        (lambda w: w.update({"enc.norm.bias": None}), "holds 'enc.norm.bias' of type NoneType"),
        (lambda w: w.update({"enc.pos_embed": 3}), "holds 'enc.pos_embed' of type int"),
        (lambda w: w.update({"enc.pos_embed": torch.zeros(3)}), "holds enc.pos_embed of shape (3,)"),
        (lambda w: w["enc.norm.bias"].fill_(torch.nan), "1 tensors of"),
        (lambda w: w["enc.norm.bias"].__setitem__(0, torch.inf), "hold NaN or inf (encoder.norm.bias)"),
    ],
)
def test_weights_that_are_damaged_or_not_whole_are_refused_by_name(change, words, official, load_content):
    changed = copy.deepcopy(official)
    change(changed["state_dict"])
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_content(changed)


@pytest.mark.parametrize("told", [None, "all"])
def test_weights_without_their_settings_are_refused(told, official, tmp_path):
    torch.save({"state_dict": official["state_dict"], "hyper_parameters": told}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"without the settings .*; give the original checkpoint"):
        load(tmp_path / "x.ckpt", num_heads=3)


def test_a_number_of_heads_that_cannot_be_is_wrong_usage_or_a_damaged_file(official, load_content):
    with pytest.raises(ValueError, match=r"embed_dim 48 is not divisible by model\.num_heads 5"):
        load_content(official, num_heads=5)
    with pytest.raises(CheckpointError, match=r"damaged.*not divisible by model\.num_heads 5"):
        load_content(official, num_heads=None, enc_num_heads=5)


# ----------------------------------------------------------------------------------------------------- naming


def test_a_name_that_no_rule_fits_or_that_two_tensors_would_have_is_refused():
    table, one = {r"enc\.(\d+)\.": r"encoder.\1.", r"e\.": "encoder."}, torch.zeros(1)
    assert list(renamed({"enc.1.norm.bias": one}, table, "XTRA", "F")) == ["encoder.1.norm.bias"]
    for name in ("enc.a.weight", "an.enc.1.weight", "enc-1.weight"):
        with pytest.raises(CheckpointError, match=f"F holds {name!r}, which is no part of an XTRA model"):
            renamed({name: one}, table, "XTRA", "F")
    with pytest.raises(CheckpointError, match=r"F holds 'e\.1\.bias'"):
        renamed({"enc.1.bias": one, "e.1.bias": one}, table, "XTRA", "F")


def test_the_ratio_of_two_widths_gives_the_hidden_one_back():
    pairs = [(h, w) for w in range(1, 200) for h in range(1, 200)]
    assert any(int(w * (h / w)) != h for h, w in pairs), "a plain quotient loses a unit"
    assert all(int(w * ratio_of(h, w)) == h for h, w in pairs)
