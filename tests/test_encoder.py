"""Encoder and predictor: initial weights, recomputed layers, precision, attention and other image sizes."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.testing import assert_close

from nextblock.evaluate.features import seeded
from nextblock.models import NextBlockModel
from nextblock.models.vit import resample_positions, sincos_positions
from nextblock.presets import model_config
from test_next_block import DRAWS, IMAGES, OBLONG, ORDER, PREFIX, slow_encoding
from toy import tiny_config, tiny_images, tiny_model


@pytest.fixture(scope="module")
def aim():
    changes = {"embed_dim": 192, "depth": 2, "num_heads": 3, "predictor_depth": 2}
    with seeded(0):
        return NextBlockModel(model_config("aim-600m", **changes))


def modules_of(model, kind):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def test_weights_and_positions_have_deviation_002_biases_are_zero_and_norms_begin_as_the_identity():
    # Wide enough for statistics.
    sizes = {"embed_dim": 192, "projection_dim": 256, "predictor_dim": 128, "predictor_heads": 2}
    sizes |= {"block_mlp_dim": 96, "image_size": 64, "patch_size": 8, "num_predicted_blocks": 2}
    with seeded(0):
        fresh: Any = NextBlockModel(tiny_config(**sizes))
    linear, norms = (list(modules_of(fresh, kind).values()) for kind in (nn.Linear, nn.LayerNorm))
    assert (len(linear), len(norms)) == (2 * 4 + 2 * 4 + 2 + 2 * 2, 2 * (2 * 2 + 1))
    for module in linear:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(module.weight.mean().item()) < 0.0005
        assert module.bias is None or not module.bias.any()
    assert [m.bias is None for m in fresh.predictor.projection if isinstance(m, nn.Linear)] == [False, True]
    for positions in (fresh.encoder.pos_embed, fresh.predictor.pos_embed):
        assert positions.std().item() == pytest.approx(0.02, rel=0.03)
    for norm in norms:
        assert norm.eps == 1e-6
        assert (norm.weight == 1).all()
        assert not norm.bias.any()


def test_aims_weights_are_xavier_uniform_and_its_few_biases_zero(aim):
    parts = [aim.encoder.patch_embed.proj.weight.flatten(1)]  # a linear map of pixels
    for name, module in modules_of(aim, nn.Linear).items():
        parts += module.weight.chunk(3) if name.endswith("qkv") else [module.weight]
    for part in parts:
        bound = math.sqrt(6 / (part.shape[0] + part.shape[1]))
        assert bound * 0.999 < part.abs().max().item() <= bound * 1.001
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    biases = {name: tensor for name, tensor in aim.state_dict().items() if name.endswith(".bias")}
    norms = modules_of(aim, nn.LayerNorm)
    ends = {"encoder.patch_embed.proj", "predictor.projection", "predictor.block_mlps.0"}
    assert {name.removesuffix(".bias") for name in biases} == norms.keys() | ends
    assert not any(bias.any() for bias in biases.values())
    assert {norm.eps for norm in norms.values()} == {1e-5}


def slow_sincos(row, column, dim):
    values = []
    for place in (column, row):
        angles = [place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
        values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return values


def test_fixed_positions_are_sines_and_cosines_of_column_then_row_and_are_not_trained(aim):
    expected = [slow_sincos(row, column, 24) for row in range(3) for column in range(5)]
    assert_close(sincos_positions((3, 5), 24)[0], torch.tensor(expected))
    assert torch.equal(aim.predictor.pos_embed, sincos_positions((16, 16), 2048))
    assert not aim.encoder.pos_embed.requires_grad
    assert not aim.predictor.pos_embed.requires_grad


def test_recomputing_runs_every_layer_twice_and_changes_nothing():
    model: Any = tiny_model(depth=4, drop_path=0.6).train()
    layers, calls, runs = (*model.encoder.blocks, *model.predictor.blocks), [], []
    for layer in layers:
        layer.attn.register_forward_pre_hook(lambda module, _: calls.append(module))
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad(set_to_none=True)
        calls.clear()
        loss = model(IMAGES, ORDER, PREFIX, DRAWS[:2]).loss
        loss.backward()
        assert [calls.count(layer.attn) for layer in layers] == [1 + recompute] * 6
        runs.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (loss, gradients), (other_loss, other_gradients) = runs
    assert torch.equal(loss, other_loss)
    assert None not in gradients.values()
    assert_close(other_gradients, gradients)


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_under_bf16_the_loss_is_fp32_and_near_that_of_fp32(prefix):
    model = tiny_model(num_predicted_blocks=2)
    expected = model(IMAGES, ORDER, prefix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IMAGES, ORDER, prefix)
    assert out.predictions.dtype == torch.bfloat16
    assert {out.loss.dtype, out.targets.dtype, out.block_loss.dtype} == {torch.float32}
    assert torch.equal(out.targets, expected.targets)
    assert_close(out.loss, expected.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize("fp32", [True, False])
def test_predictor_fp32_keeps_the_predictors_layers_alone_out_of_autocast(fp32):
    model, dtypes = tiny_model(), {}
    layer = "predictor.blocks.1.mlp.fc2"
    others = ("encoder.blocks.1.mlp.fc2", "predictor.projection.2", "predictor.block_mlps.0.2")
    for name in (layer, *others):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: dtypes.update([(name, torch.as_tensor(output).dtype)])
        )
    model.predictor_fp32 = fp32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(IMAGES, ORDER).predictions.dtype == torch.bfloat16
    assert dtypes[layer] == (torch.float32 if fp32 else torch.bfloat16)
    assert {dtypes[name] for name in others} == {torch.bfloat16}


@pytest.mark.parametrize("changes", [{}, OBLONG, {"block_size": 1}], ids=str)
def test_causal_encoding_is_that_of_the_loop_mask_in_raster_order(changes):
    model = tiny_model(**changes)
    images = tiny_images(size=model.config.image_size)
    encoded = model.encode(images, attention="causal")
    assert_close(encoded.tokens, slow_encoding(model, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "other"), [("causal", "full"), ("full", "causal")])
def test_native_attention_is_what_the_model_records_and_the_encoder_alone_applies_no_mask(kind, other):
    model = tiny_model(feature_attention=kind)
    tokens, full = model.encode(IMAGES).tokens, model.encode(IMAGES, attention="full").tokens
    assert torch.equal(tokens, model.encode(IMAGES, attention=kind).tokens)
    assert (tokens - model.encode(IMAGES, attention=other).tokens).abs().max() > 0.01
    for alone in (model.encoder, model.encoder.forward_features):
        assert_close(alone(IMAGES), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"block_size": (4, 6)}, (16, 24), r"one block.*smaller model\.block_size"),
        ({}, (8, 8), "one block"),
        ({"num_predicted_blocks": 5}, (8, 16), "blocks"),
        ({"predictor": None}, (16, 24), "encodes, but cannot predict"),
    ],
)
def test_what_cannot_be_predicted_can_be_encoded(changes, size, words):
    model, images = tiny_model(**changes), tiny_images(size=size)
    causal, full = (model.encode(images, attention=kind).tokens for kind in ("causal", "full"))
    assert causal.shape == (2, size[0] * size[1] // 16, 24)
    if "one block" in words:
        assert_close(causal, full, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=words):
        model(images)


def test_positions_of_another_grid_are_resampled_bicubically_and_the_same_grid_is_left_alone():
    positions = torch.randn(1, 24, 5)
    assert resample_positions(positions, (4, 6), (4, 6)) is positions
    as_image = positions.view(1, 4, 6, 5).permute(0, 3, 1, 2)
    for antialias in (True, False):
        resampled = resample_positions(positions, (4, 6), (8, 3), antialias=antialias)
        expected = interpolate(as_image, (8, 3), mode="bicubic", antialias=antialias)
        assert_close(resampled, expected.permute(0, 2, 3, 1).reshape(1, 24, 5))


@pytest.mark.parametrize("changes", [{}, {"resample_antialias": False}, {"positions": "sincos"}], ids=str)
@pytest.mark.parametrize("size", [(32, 48), (24, 16), (8, 48)])
def test_another_image_size_is_encoded_and_predicted_as_by_a_model_of_that_size(size, changes):
    model, other = tiny_model(**changes), tiny_model(image_size=size, **changes)
    weights = dict(model.state_dict())
    for name in ("encoder.pos_embed", "predictor.pos_embed"):
        weights[name] = other.state_dict()[name]  # fixed ones are computed anew, learned ones resampled
        if "positions" not in changes:
            antialias = model.config.resample_antialias
            grids = model.config.grid, other.config.grid
            weights[name] = resample_positions(model.state_dict()[name], *grids, antialias=antialias)
    other.load_state_dict(weights)
    images, prefix = tiny_images(size=size), torch.tensor([0, 2])
    for kind in ("causal", "full"):
        here, there = model.encode(images, attention=kind), other.encode(images, attention=kind)
        assert_close(here.tokens, there.tokens, atol=1e-5, rtol=1e-5)
    assert_close(model(images, None, prefix).loss, other(images, None, prefix).loss)


def test_under_full_attention_the_patches_alone_must_divide_the_image():
    model, images = tiny_model(), tiny_images(size=(12, 20))
    assert model.encode(images, attention="full").tokens.shape == (2, 15, 24)
    with pytest.raises(ValueError, match="cannot be cut into blocks of 2x2"):
        model.encode(images, attention="causal")
    with pytest.raises(ValueError, match="cannot be cut into 4-px patches"):
        model.encode(tiny_images(size=(13, 20)), attention="full")
