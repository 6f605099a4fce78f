"""timm's format, out: what is written opens in timm and transformers as the same function, and comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from nextblock.checkpoint import CheckpointError, read_data
from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.evaluate.features import seeded
from nextblock.interop.cards import Provenance
from nextblock.interop.files import LoadOptions
from nextblock.interop.timm import encoder_at, is_timm_directory, read_timm, write_timm
from nextblock.interop.timm_models import NextBlockViT
from nextblock.interop.timm_spec import read_timm_data
from nextblock.interop.xtra import read_xtra
from nextblock.models import NextBlockModel
from nextblock.models.vit import positions_of
from toy import tiny_images

XTRA = ModelConfig(
    image_size=(16, 24), patch_size=4, block_size=2, embed_dim=24, depth=3, num_heads=3, predictor=None
)
AIM = replace(XTRA, block_size=1, positions="sincos", bias=False, patch_norm=True, feature_attention="full")
CONFIGS = {
    "xtra": XTRA,
    "xtra, random orders": replace(XTRA, order="random", order_seed=3, block_size=(2, 3)),
    "xtra, full attention": replace(XTRA, feature_attention="full"),
    "aim": AIM,
    "aim, as trained": replace(AIM, norm_eps=1e-5),
    "aim, causal": replace(AIM, feature_attention="causal", order="spiral"),
}
STOCK = ("xtra, full attention", "aim")
DATA = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), val_resize_px=19)
FROM_TEST = Provenance(origin="a test", license="mit")
TINY_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def encoder(config, seed=0):
    """A model of these settings whose every trained weight matters."""
    with seeded(seed):
        model = NextBlockModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def written(model, directory, data=DATA, **settings):
    write_timm(model, directory, data=data, provenance=FROM_TEST, **settings)
    return directory


def opened(directory, **settings) -> Any:
    return timm.create_model(f"local-dir:{directory}", pretrained=True, **settings).eval()


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- out


def test_what_is_written_opens_in_timm_and_comes_back_as_the_same_encoder(kind, tmp_path):
    # The predictor is left out.
    predictor = {"predictor": "transformer", "predictor_dim": 16, "predictor_heads": 2, "predictor_depth": 1}
    model, images = encoder(replace(CONFIGS[kind], **predictor)), tiny_images()
    expected = model.encode(images)
    vit = opened(written(model, tmp_path / "out"))
    assert (type(vit) is VisionTransformer) == (kind in STOCK)
    assert_same(vit(images), expected.tokens.mean(dim=1))
    final, layers = vit.forward_intermediates(images, output_fmt="NLC")
    for found, layer in zip((final, *layers), (expected.tokens, *expected.layers), strict=True):
        assert_same(found, layer)
    # transformers gives num_classes itself, so it must not stand among the arguments
    assert "num_classes" not in json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    assert is_timm_directory(tmp_path / "out")
    back = read_timm(tmp_path / "out")
    assert back.config == replace(model.config, predictor=None)
    assert torch.equal(back.encode(images).tokens, expected.tokens)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["xtra", "aim", "aim, as trained"])
def test_transformers_opens_the_same_directory_as_the_same_function(name, tmp_path):
    from transformers import AutoModel

    model, images = encoder(CONFIGS[name]), tiny_images()
    found = AutoModel.from_pretrained(written(model, tmp_path / "out")).eval()
    outputs = found(images, output_hidden_states=True)
    expected = model.encode(images)
    assert_same(outputs.last_hidden_state, expected.tokens)
    assert_same(outputs.pooler_output, expected.tokens.mean(dim=1))
    assert len(outputs.hidden_states) == 3


def test_the_golden_tokens_of_official_xtra_come_out_of_timm(golden_dir, golden, tmp_path):
    content = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
    model = read_xtra(content, "xtra_k2.ckpt", LoadOptions(num_heads=3))
    assert isinstance(model, NextBlockModel)
    tensors = golden("xtra_k2")
    vit = opened(written(model, tmp_path / "out"))
    with torch.no_grad():
        assert_same(vit.forward_features(tensors["images"]), tensors["encoder_tokens"], 1e-4)


def test_heads_and_channels_are_changed_as_in_any_timm_model(kind, tmp_path):
    directory, images = written(encoder(CONFIGS[kind]), tmp_path / "out"), tiny_images()
    vit = opened(directory, num_classes=10)
    assert vit(images).shape == (2, 10)
    vit.reset_classifier(num_classes=5)
    assert vit(images).shape == (2, 5)
    maps = opened(directory, features_only=True, out_indices=[0, 2])(images)
    assert [m.shape for m in maps] == [(2, 24, 4, 6)] * 2
    assert opened(directory, in_chans=1).forward_features(torch.zeros(1, 1, 16, 24)).shape == (1, 24, 24)


def test_images_are_cut_and_normalised_in_timm_as_in_the_run(tmp_path):
    model = encoder(replace(XTRA, image_size=16, depth=1))
    settings = resolve_model_data_config(opened(written(model, tmp_path / "center")))
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (DATA.mean, DATA.std)
    assert "Resize(size=19, interpolation=bicubic" in str(create_transform(**settings))
    squashed = replace(DATA, val_crop="squash")
    assert (
        resolve_model_data_config(opened(written(model, tmp_path / "s", squashed)))["crop_mode"] == "squash"
    )
    for directory, data in (("center", DATA), ("s", squashed)):
        assert read_timm_data(tmp_path / directory) == data
        assert read_timm_data(tmp_path / directory / "model.safetensors") == data
        assert read_data(tmp_path / directory / "model.safetensors") == data


def test_timm_rounds_to_the_size_that_the_run_resized_to(tmp_path):
    model = encoder(replace(XTRA, image_size=16, depth=1))
    for resize_px in range(16, 60):
        data = replace(DATA, val_resize_px=resize_px)
        assert read_timm_data(written(model, tmp_path / f"{resize_px}", data)) == data


def test_weights_with_nan_are_not_written(tmp_path):
    model = encoder(XTRA)
    with torch.no_grad():
        model.get_parameter("encoder.blocks.1.norm1.bias")[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"1 tensors .* NaN or inf \(blocks\.1\.norm1\.bias\)"):
        written(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ other image sizes


LARGER = (32, 48)


def test_another_image_size_is_written_as_the_model_encodes_it(kind, tmp_path):
    model, images = encoder(CONFIGS[kind]), tiny_images(size=LARGER)
    directory = written(model, tmp_path / "out", image_size=LARGER)
    expected = model.encode(images).tokens
    assert_same(opened(directory).forward_features(images), expected)
    back = read_timm(directory)
    assert pair(back.config.image_size) == LARGER
    assert_same(back.encode(images).tokens, expected)
    data = read_timm_data(directory)
    assert data is not None
    assert data.val_resize_px == 38


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"aim"}))
def test_other_image_sizes_asked_of_timm_are_those_of_the_model(name, tmp_path):
    config, larger = CONFIGS[name], LARGER
    if name in STOCK:  # timm 1.0.26 takes every grid for square when it resamples
        config, larger = replace(config, image_size=16), (32, 32)
    model, images = encoder(config), tiny_images(size=larger)
    directory = written(model, tmp_path / "out")
    expected = model.encode(images).tokens
    assert_same(opened(directory, img_size=larger).forward_features(images), expected)
    vit = opened(directory)
    vit.set_input_size(img_size=larger)
    assert_same(vit.forward_features(images), expected)


def test_learned_positions_are_resampled_as_timm_does():
    model = encoder(XTRA)
    own = positions_of(model.encoder)
    theirs = resample_abs_pos_embed(own, [8, 12], [4, 6], num_prefix_tokens=0)
    assert torch.equal(positions_of(encoder_at(model, LARGER).encoder), theirs)


def test_an_image_size_that_the_blocks_do_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be cut into blocks of 2x2"):
        written(encoder(XTRA), tmp_path / "out", image_size=(16, 28))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot be cut into blocks of 2x2"):
        masked_vit().set_input_size(img_size=(16, 28))


# --------------------------------------------------------------------------------------------- the masked ViT


def masked_vit(**changes) -> Any:
    with seeded(0):
        return NextBlockViT(**{**TINY_VIT, "block_size": 2, **changes})


def test_no_later_block_reaches_an_earlier_one():
    images = tiny_images(size=(16, 16)).requires_grad_()
    vit = masked_vit(order="spiral")
    first = vit.order_mask.sum(dim=1).argmin()  # a patch of the first block
    vit.forward_features(images)[:, first].square().sum().backward()
    assert images.grad is not None
    reached = images.grad.abs().sum(dim=(0, 1)) > 0
    assert reached.sum() == 8 * 8  # its own block, 2x2 patches of 4x4 px


def test_activation_checkpointing_recomputes_every_layer_and_changes_no_gradient():
    images, calls, gradients = tiny_images(size=(16, 16)), [], []
    for recompute in (False, True):
        vit = masked_vit().train()
        vit.set_grad_checkpointing(recompute)
        count = []
        for block in vit.blocks:
            block.norm1.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        vit.forward_features(images).square().sum().backward()
        calls.append(len(count))
        gradients.append(vit.patch_embed.proj.weight.grad)
    assert calls == [2, 4]
    assert_same(gradients[0], gradients[1], 1e-6)


def test_another_mask_patch_size_or_argument_is_refused():
    vit = masked_vit()
    with pytest.raises(ValueError, match="brings its own mask"):
        vit(tiny_images(size=(16, 16)), attn_mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="made for patches of 4 px"):
        vit.set_input_size(img_size=(16, 16), patch_size=(8, 8))
    with pytest.raises(TypeError, match=r"no argument \['qk_norm'\]"):
        masked_vit(qk_norm=True)
