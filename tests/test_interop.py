"""Official XTRA files: what their settings mean, and what is refused by name."""

import re

import pytest
import torch

from nextblock.checkpoint import CheckpointError
from nextblock.interop import load
from nextblock.models.heads import ImageClassifier
from toy import tiny_images

UNFUSED = {f"{part}_{name}": value for part in ("enc", "predictor") for name, value in
           (("qk_scale", 0.5), ("fused_attn", False))}  # fmt: skip
RANDOM = {"aim_pseudo_random": True, "seed": 3}
IMAGES = tiny_images(size=(64, 64))


@pytest.fixture
def content(golden_dir, request):
    """The content of an official file, to be changed: a model's, or the parameter's."""
    name = getattr(request, "param", "xtra_k2")
    return torch.load(golden_dir / f"{name}.ckpt", weights_only=True)


@pytest.fixture
def load_content(tmp_path):
    def save_and_load(content, num_heads=3, **settings):
        hyper_parameters = {**content["hyper_parameters"], **settings}
        torch.save({**content, "hyper_parameters": hyper_parameters}, tmp_path / "official.ckpt")
        return load(tmp_path / "official.ckpt", num_heads=num_heads)

    return save_and_load


@pytest.mark.parametrize(("arch", "heads"), [("vit_tiny", 3), ("vit_base", 12), ("vit_huge", 16)])
def test_the_architectures_name_tells_the_heads_unless_the_caller_does(arch, heads, content, load_content):
    assert load_content(content, num_heads=None, enc_arch=arch).config.num_heads == heads
    assert load_content(content, num_heads=6, enc_arch=arch).config.num_heads == 6


def test_an_encoder_alone_encodes_with_its_mask_or_none_and_refuses_to_predict(content, load_content):
    whole = load_content(content)
    weights = {name: w for name, w in content["state_dict"].items() if name.startswith("enc.")}
    alone = {**content, "state_dict": weights}
    causal, full = load_content(alone), load_content(alone, enc_is_block_causal=False)
    assert torch.equal(causal.encode(IMAGES).tokens, whole.encode(IMAGES).tokens)
    with pytest.raises(ValueError, match="cannot predict"):
        causal(IMAGES)
    assert (full.config.feature_attention, full.config.block_size) == ("full", 1)
    assert torch.equal(full.encode(IMAGES).tokens, causal.encode(IMAGES, attention="full").tokens)


@pytest.mark.parametrize(
    ("settings", "attention", "block_size"),
    [
        ({}, "native", None),
        ({"predictor_block_size": 4}, "block_causal", 4),
        ({"predictor_block_size": 1}, "causal", None),
        ({"predictor_is_block_causal": False, "predictor_is_causal": True}, "causal", None),
        ({"predictor_is_block_causal": None}, "full", None),
        ({"predictor_is_block_causal": False, "predictor_block_size": 4}, "full", None),
    ],
)
def test_a_predictor_has_a_mask_of_its_own(settings, attention, block_size, content, load_content):
    config = load_content(content, **settings).config
    assert (config.predictor_attention, config.predictor_block_size) == (attention, block_size)


@pytest.mark.parametrize("content", ["causal_k1"], indirect=True)
def test_a_plainly_causal_encoder_shares_its_mask_with_the_predictor(content, load_content):
    masks = {"is_block_causal": False, "is_causal": True}
    settings = {f"{part}_{name}": value for part in ("enc", "predictor") for name, value in masks.items()}
    config = load_content(content, **settings).config
    assert (config.block_size, config.predictor_attention) == (1, "native")


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"enc_img_size": [32, 128]}, "image_size", (32, 128)),
        ({"enc_img_size": [256]}, "image_size", 64),  # the positions contradict it
        (RANDOM, "order", "random"),
        (RANDOM, "order_seed", 3),
        ({"aim_l1_loss": True}, "loss", "l1"),
        ({"aim_norm_pix_loss": None}, "norm_pixels", False),
        ({"predictor_num_heads": None}, "predictor_heads", 12),
        ({}, "resample_antialias", False),  # as officially
        ({"enc_qk_scale": 0.5, "predictor_qk_scale": 0.5}, "qk_scale", None),  # fused attention has its own
        (UNFUSED, "qk_scale", 0.5),
    ],
)
def test_settings_are_read_or_have_the_official_default(settings, name, value, content, load_content):
    assert getattr(load_content(content, **settings).config, name) == value


@pytest.mark.parametrize("content", ["attentive_probe"], indirect=True)
@torch.no_grad()
def test_an_attentive_heads_scale_of_the_scores_is_honoured(content, load_content):
    plain, scaled = load_content(content), load_content(content, attentive_pooling_qk_scale=0.7)
    assert isinstance(scaled, ImageClassifier)
    plain.head.key.weight *= 0.7 * 12**0.5  # scores s q·k are those of keys s sqrt(width) times as long
    torch.testing.assert_close(scaled(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-5)
    assert (scaled(IMAGES) - load_content(content)(IMAGES)).abs().max() > 1e-3


@pytest.mark.parametrize("content", ["linear_probe"], indirect=True)
def test_a_head_without_batch_norm_and_bias_is_built_without(content, load_content):
    weights = content["state_dict"]
    for name in [n for n in weights if n.startswith("classifier.") and not n.endswith("weight")]:
        del weights[name]
    classifier = load_content(content)
    (weight,) = (w for n, w in weights.items() if n.startswith("classifier."))
    torch.testing.assert_close(classifier(IMAGES), classifier.features(IMAGES) @ weight.T)


@pytest.mark.parametrize(
    ("content", "settings", "words"),
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
    indirect=["content"],
)
def test_a_setting_that_is_not_implemented_is_refused(content, settings, words, load_content):
    with pytest.raises(CheckpointError, match="of a kind that is not implemented: .*" + re.escape(words)):
        load_content(content, **settings)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("enc-1.weight", torch.zeros(1), "holds 'enc-1.weight', which is not in the XTRA layout"),
        ("an.enc.norm.bias", torch.zeros(1), "holds 'an.enc.norm.bias', which is not in"),
        ("proj.mlp.0.weight", None, "lacks 'predictor.projection.0.weight'"),
        ("predictor.blocks.0.mlp.fc2.weight", None, "lacks 'predictor.blocks.0.mlp.fc2.weight'"),
        ("enc.norm.bias", None, "missing: encoder.norm.bias"),
        ("enc.cls_token", torch.zeros(1), "unexpected: encoder.cls_token"),
        ("momentum.x", torch.zeros(1), "holds 'momentum.x'"),
        ("enc.norm.bias", torch.zeros(5), "(5,) in the file, (48,)"),
        ("enc.patch_embed.proj.weight", torch.zeros(4, 4), "of shape (4, 4), not of 4 axes"),
        ("enc.norm.bias", "none", "holds 'enc.norm.bias' of type str"),
        ("enc.pos_embed", 3, "holds 'enc.pos_embed' of type int"),
        ("enc.pos_embed", torch.zeros(3), "holds encoder.pos_embed of shape (3,)"),
        ("enc.norm.bias", torch.full((48,), torch.nan), "NaN or inf in 1 tensor"),
        ("enc.norm.bias", torch.full((48,), torch.inf), "NaN or inf in 1 tensor (encoder.norm.bias)"),
    ],
)
def test_weights_damaged_or_not_whole_are_refused_by_name(name, tensor, words, content, load_content):
    content["state_dict"][name] = tensor
    if tensor is None:
        del content["state_dict"][name]
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_content(content)


@pytest.mark.parametrize("content", ["attentive_probe"], indirect=True)
def test_two_tensors_of_one_name_are_refused(content, load_content):
    weights = content["state_dict"]
    weights["classifier.0.running_mean"] = weights["classifier.bn.running_mean"]
    with pytest.raises(CheckpointError, match=r"holds 'classifier\.0\.running_mean', which is not in"):
        load_content(content)


@pytest.mark.parametrize("told", [None, "all"])
def test_weights_without_their_settings_are_refused(told, content, tmp_path):
    torch.save({**content, "hyper_parameters": told}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"without hyper_parameters, .*; give the original checkpoint"):
        load(tmp_path / "x.ckpt", num_heads=3)


def test_a_number_of_heads_that_cannot_be_is_wrong_usage_or_a_damaged_file(content, load_content):
    with pytest.raises(ValueError, match=r"embed_dim 48 is not divisible by model\.num_heads 5"):
        load_content(content, num_heads=5)
    with pytest.raises(CheckpointError, match=r"damaged.*not divisible by model\.num_heads 5"):
        load_content(content, num_heads=None, enc_num_heads=5)
