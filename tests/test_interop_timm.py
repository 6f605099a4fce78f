"""timm's format: what is written opens in timm and transformers as the same function, and comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer

from nextblock.checkpoint import read_data
from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.evaluate.features import seeded
from nextblock.interop.cards import Provenance
from nextblock.interop.options import LoadOptions
from nextblock.interop.timm_format import (
    is_timm_directory,
    read_timm,
    read_timm_data,
    write_timm,
)
from nextblock.interop.timm_models import NextBlockViT
from nextblock.interop.xtra import read_xtra
from nextblock.models import NextBlockModel
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
TINY_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


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


def written(model, directory, **settings):
    write_timm(model, directory, data=DATA, provenance=FROM_TEST, **settings)
    return directory


def opened(directory, **settings) -> Any:
    return timm.create_model(f"local-dir:{directory}", pretrained=True, **settings).eval()


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- out


def test_timm_opens_what_is_written_as_the_same_function(kind, tmp_path):
    model, images = encoder(CONFIGS[kind]), tiny_images()
    expected = model.encode(images)
    vit = opened(written(model, tmp_path / "out"))
    assert (type(vit) is VisionTransformer) == (kind in STOCK)
    assert_same(vit.forward_features(images), expected.tokens)
    assert_same(vit(images), expected.tokens.mean(dim=1))
    final, layers = vit.forward_intermediates(images, output_fmt="NLC")
    assert_same(final, expected.tokens)
    for found, layer in zip(layers, expected.layers, strict=True):
        assert_same(found, layer)


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


def test_what_is_written_is_read_back_as_the_same_encoder(kind, tmp_path):
    model, images = encoder(CONFIGS[kind]), tiny_images()
    directory = written(model, tmp_path / "out")
    assert is_timm_directory(directory)
    back = read_timm(directory)
    assert back.config == model.config
    assert torch.equal(back.encode(images).tokens, model.encode(images).tokens)


def test_the_golden_tokens_of_official_xtra_come_out_of_timm(golden_dir, golden, tmp_path):
    content = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
    model = read_xtra(content, "xtra_k2.ckpt", LoadOptions(num_heads=3))
    assert isinstance(model, NextBlockModel)
    tensors = golden("xtra_k2")
    vit = opened(written(model, tmp_path / "out"))
    with torch.no_grad():
        assert_same(vit.forward_features(tensors["images"]), tensors["encoder_tokens"], 1e-4)


def test_a_predictor_is_left_out(tmp_path):
    with_predictor = replace(
        XTRA, predictor="transformer", predictor_dim=16, predictor_heads=2, predictor_depth=1
    )
    directory = written(encoder(with_predictor), tmp_path / "out")
    assert not any(name.startswith("predictor") for name in load_file(directory / "model.safetensors"))
    assert read_timm(directory).config == replace(with_predictor, predictor=None)


@pytest.mark.slow
def test_a_mask_is_not_opened_without_its_class_and_the_card_tells_the_line_to_type(tmp_path):
    directory = written(encoder(XTRA), tmp_path / "out")
    code = f"import timm; timm.create_model('local-dir:{directory}', pretrained=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Unknown model (nextblock_vit)" in done.stderr
    card = (directory / "README.md").read_text()
    assert "import nextblock.interop.timm_models" in card
    assert "Unknown model (nextblock_vit)" in card


def test_heads_are_made_and_changed_as_in_any_timm_model(kind, tmp_path):
    directory, images = written(encoder(CONFIGS[kind]), tmp_path / "out"), tiny_images()
    assert opened(directory, num_classes=0)(images).shape == (2, 24)
    vit = opened(directory, num_classes=10)
    assert vit(images).shape == (2, 10)
    vit.reset_classifier(num_classes=5)
    assert vit(images).shape == (2, 5)
    maps = opened(directory, features_only=True, out_indices=[0, 2])(images)
    assert [m.shape for m in maps] == [(2, 24, 4, 6)] * 2


def test_grey_images_are_taken_by_adding_up_the_colours_weights(tmp_path):
    directory = written(encoder(XTRA), tmp_path / "out")
    assert opened(directory, in_chans=1).forward_features(torch.zeros(1, 1, 16, 24)).shape == (1, 24, 24)


def test_images_are_cut_and_normalised_in_timm_as_in_the_run(tmp_path):
    model = encoder(replace(XTRA, image_size=16, block_size=2))
    directory = written(model, tmp_path / "out")
    told = resolve_model_data_config(opened(directory))
    assert (tuple(told["mean"]), tuple(told["std"])) == (DATA.mean, DATA.std)
    assert "Resize(size=19, interpolation=bicubic" in str(create_transform(**told))
    assert read_timm_data(directory) == DATA
    assert read_data(directory / "model.safetensors") == DATA


def test_the_way_images_are_cut_goes_out_and_comes_back(tmp_path):
    data, config = replace(DATA, val_crop="squash"), replace(XTRA, image_size=16, depth=1)
    write_timm(encoder(config), tmp_path / "out", data=data, provenance=FROM_TEST)
    assert resolve_model_data_config(opened(tmp_path / "out"))["crop_mode"] == "squash"
    assert read_timm_data(tmp_path / "out") == data
    assert read_data(tmp_path / "out" / "model.safetensors") == data


@pytest.mark.parametrize("resize_px", range(16, 60))
def test_timm_rounds_to_the_size_that_the_run_resized_to(resize_px, tmp_path):
    config = replace(XTRA, image_size=16, depth=1)
    write_timm(
        encoder(config), tmp_path / "out", data=replace(DATA, val_resize_px=resize_px), provenance=FROM_TEST
    )
    data = read_timm_data(tmp_path / "out")
    assert data is not None
    assert data.val_resize_px == resize_px


def test_what_transformers_gives_itself_is_not_in_the_arguments(kind, tmp_path):
    directory = written(encoder(CONFIGS[kind]), tmp_path / "out")
    assert "num_classes" not in json.loads((directory / "config.json").read_text())["model_args"]


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
    assert_same(opened(directory, dynamic_img_size=True).forward_features(images), expected)
    vit = opened(directory)
    vit.set_input_size(img_size=larger)
    assert_same(vit.forward_features(images), expected)


def test_timms_resampling_of_fixed_positions_is_another_function(tmp_path):
    model, images = encoder(replace(AIM, image_size=16)), tiny_images(size=(32, 32))
    directory = written(model, tmp_path / "out")
    resampled = opened(directory, img_size=(32, 32)).forward_features(images)
    assert (resampled - model.encode(images).tokens).abs().max() > 0.1
    assert "resamples the fixed positions" in (directory / "README.md").read_text()


def test_an_image_size_that_the_blocks_do_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be cut into blocks of 2x2"):
        written(encoder(XTRA), tmp_path / "out", image_size=(16, 28))
    assert not (tmp_path / "out").exists()
    vit = NextBlockViT(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, block_size=2)
    with pytest.raises(ValueError, match="cannot be cut into blocks of 2x2"):
        vit.set_input_size(img_size=(16, 28))


# --------------------------------------------------------------------------------------------- the masked ViT


def masked_vit(**changes) -> Any:
    with seeded(0):
        return NextBlockViT(
            **{
                "img_size": 16,
                "patch_size": 4,
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 3,
                "block_size": 2,
                **changes,
            }
        )


def test_no_later_block_reaches_an_earlier_one():
    images = tiny_images(size=(16, 16)).requires_grad_()
    tokens = masked_vit(order="spiral").forward_features(images)
    first = masked_vit(order="spiral").order_mask.sum(dim=1).argmin()  # a patch of the first block
    tokens[:, first].square().sum().backward()
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
            block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        final, layers = vit.forward_intermediates(images)
        (final.sum() + layers[0].square().sum()).backward()
        calls.append(len(count))
        gradients.append(vit.patch_embed.proj.weight.grad)
    assert calls == [2, 4]
    assert_same(gradients[0], gradients[1], 1e-6)


def test_layers_are_chosen_as_timm_does():
    vit, images = masked_vit().eval(), tiny_images(size=(16, 16))
    every = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    (last,) = vit.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(last, every[1])
    (first,) = vit.forward_intermediates(
        images, indices=[0], stop_early=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert torch.equal(first, vit.norm(every[0]))
    told = vit.forward_intermediates(images, output_dict=True)
    assert told["image_intermediates"][0].shape == (2, 24, 4, 4)
    assert torch.equal(told["image_features"], vit.forward_features(images))
    (unnormed,) = vit.get_intermediate_layers(images, n=[1])
    assert torch.equal(unnormed, every[1])


def test_another_mask_and_another_patch_size_are_refused():
    vit = masked_vit()
    with pytest.raises(ValueError, match="brings its own mask"):
        vit(tiny_images(size=(16, 16)), attn_mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="made for patches of 4 px"):
        vit.set_input_size(img_size=(16, 16), patch_size=(8, 8))
