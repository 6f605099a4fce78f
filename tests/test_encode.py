"""Encoding: which attention, which image sizes, and what comes out in which order."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from nextblock.blocks import patchify
from nextblock.models.vit import patch_tokens, resample_positions
from test_next_block import OBLONG, slow_encoding
from toy import tiny_images, tiny_model

# ----------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("changes", [{}, OBLONG, {"block_size": 1}], ids=str)
def test_causal_encoding_is_that_of_the_loop_mask_in_raster_order(changes):
    model = tiny_model(**changes)
    images = tiny_images(size=model.config.image_size)
    encoded = model.encode(images, attention="causal")
    torch.testing.assert_close(encoded.tokens, slow_encoding(model, images), atol=1e-5, rtol=1e-5)


def test_the_encoder_alone_applies_no_mask():
    model, images = tiny_model(), tiny_images()
    full = model.encode(images, attention="full").tokens
    torch.testing.assert_close(model.encoder(images), full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encoder.forward_features(images), full, atol=1e-5, rtol=1e-5)
    assert (full - model.encode(images, attention="causal").tokens).abs().max() > 0.01


def test_layers_are_what_each_returns_and_tokens_the_norm_of_the_last():
    model, images, outputs = tiny_model(), tiny_images(), []
    for layer in model.encoder.blocks:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    encoded = model.encode(images)
    assert len(encoded.layers) == model.config.depth
    assert all(torch.equal(a, b) for a, b in zip(encoded.layers, outputs, strict=True))
    assert torch.equal(encoded.tokens, model.encoder.norm(encoded.layers[-1]))


def test_one_block_encodes_with_full_attention_and_refuses_to_predict():
    model, images = tiny_model(block_size=(4, 6)), tiny_images()
    causal, full = (model.encode(images, attention=kind).tokens for kind in ("causal", "full"))
    torch.testing.assert_close(causal, full, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"one block.*smaller model\.block_size"):
        model(images)


def test_an_image_of_one_block_is_refused_by_a_model_of_several():
    model = tiny_model()
    with pytest.raises(ValueError, match="one block"):
        model(tiny_images(size=(8, 8)))
    assert model.encode(tiny_images(size=(8, 8))).tokens.shape == (2, 4, 24)


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_native_attention_is_what_the_model_records(kind):
    model, images = tiny_model(feature_attention=kind), tiny_images()
    other = "full" if kind == "causal" else "causal"
    assert torch.equal(model.encode(images).tokens, model.encode(images, attention=kind).tokens)
    assert not torch.allclose(model.encode(images).tokens, model.encode(images, attention=other).tokens)


def test_an_image_that_cannot_be_predicted_can_be_encoded():
    far = tiny_model(num_predicted_blocks=5)
    assert far.encode(tiny_images(size=(8, 16))).tokens.shape == (2, 8, 24)


def test_an_encoder_without_a_predictor_encodes_and_refuses_to_predict():
    model = tiny_model(predictor=None)
    assert model.predictor is None
    assert model.encode(tiny_images()).tokens.shape == (2, 24, 24)
    with pytest.raises(ValueError, match="encodes, but cannot predict"):
        model(tiny_images())


# ------------------------------------------------------------------------------------------ other image sizes


def test_positions_of_another_grid_are_resampled_bicubically_and_the_same_grid_is_left_alone():
    positions = torch.randn(1, 24, 5)
    assert resample_positions(positions, (4, 6), (4, 6)) is positions
    resampled = resample_positions(positions, (4, 6), (8, 3))
    expected = interpolate(
        positions.view(1, 4, 6, 5).permute(0, 3, 1, 2), (8, 3), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(resampled, expected.permute(0, 2, 3, 1).reshape(1, 24, 5))
    plain = interpolate(positions.view(1, 4, 6, 5).permute(0, 3, 1, 2), (8, 3), mode="bicubic")
    without = resample_positions(positions, (4, 6), (8, 3), antialias=False)
    torch.testing.assert_close(without, plain.permute(0, 2, 3, 1).reshape(1, 24, 5))
    constant = torch.full((1, 24, 5), 0.3)
    torch.testing.assert_close(resample_positions(constant, (4, 6), (7, 9)), constant[:, :1].expand(1, 63, 5))


def test_a_model_resamples_its_positions_as_its_settings_say():
    model, images = tiny_model(), tiny_images(size=(8, 16))
    other = tiny_model(resample_antialias=False)
    assert not torch.allclose(model.encode(images).tokens, other.encode(images).tokens, atol=1e-4)


def test_a_square_grid_of_as_many_patches_is_another_grid():
    positions = torch.randn(1, 16, 3)
    assert not torch.allclose(resample_positions(positions, (2, 8), (4, 4)), positions)


@pytest.mark.parametrize("size", [(32, 48), (24, 16), (8, 48)])
def test_another_image_size_is_encoded_and_predicted_as_by_a_model_of_that_size(size):
    model, other = tiny_model(), tiny_model(image_size=size)
    weights = dict(model.state_dict())
    for name in ("encoder.pos_embed", "predictor.pos_embed"):
        weights[name] = resample_positions(weights[name], model.config.grid, other.config.grid)
    other.load_state_dict(weights)
    images = tiny_images(size=size)
    for kind in ("causal", "full"):
        here, there = model.encode(images, attention=kind), other.encode(images, attention=kind)
        torch.testing.assert_close(here.tokens, there.tokens, atol=1e-5, rtol=1e-5)
    prefix = torch.tensor([0, 2])
    torch.testing.assert_close(model(images, None, prefix).loss, other(images, None, prefix).loss)


def test_under_full_attention_the_patches_alone_must_divide_the_image():
    model, images = tiny_model(), tiny_images(size=(12, 20))
    assert model.encode(images, attention="full").tokens.shape == (2, 15, 24)
    with pytest.raises(ValueError, match="cannot be cut into blocks of 2x2"):
        model.encode(images, attention="causal")
    with pytest.raises(ValueError, match="cannot be cut into 4-px patches"):
        model.encode(tiny_images(size=(13, 20)), attention="full")


def test_patch_tokens_are_the_patch_projection_and_the_positions():
    model, images = tiny_model(), tiny_images()
    weight, bias = model.encoder.patch_embed.proj.weight, model.encoder.patch_embed.proj.bias
    expected = patchify(images, (4, 4)) @ weight.flatten(1).T + bias + model.encoder.pos_embed
    found = patch_tokens(model.encoder, images, model.config)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
