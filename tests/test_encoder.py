"""Encoder and predictor: initial weights, drop path, recomputed layers, precision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextblock.config import ModelConfig
from nextblock.evaluate.features import seeded
from nextblock.models import NextBlockModel
from nextblock.models.vit import positions_of, positions_on, sincos_positions
from nextblock.presets import SIZES
from toy import tiny_images, tiny_model

ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
PREFIX = torch.tensor([3, 5])

# -------------------------------------------------------------------------------------------- initial weights


@pytest.fixture(scope="module")
def fresh():
    """Wide enough for statistics."""
    with seeded(0):
        return NextBlockModel(
            ModelConfig(
                image_size=64,
                patch_size=8,
                embed_dim=192,
                depth=2,
                num_heads=3,
                projection_dim=256,
                predictor_dim=128,
                predictor_depth=2,
                predictor_heads=2,
                block_mlp_dim=96,
                num_predicted_blocks=2,
            )
        )


def test_linear_weights_have_deviation_002_and_biases_are_zero(fresh):
    linear = [module for module in fresh.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 2 * 4 + 2 * 4 + 2 + 2 * 2
    for module in linear:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(module.weight.mean().item()) < 0.0005
        assert module.bias is None or not module.bias.any()
    assert [m.bias is None for m in fresh.predictor.projection if isinstance(m, nn.Linear)] == [False, True]


def test_the_patch_projection_is_kaiming_normal_by_its_inputs(fresh):
    projection = fresh.encoder.patch_embed.proj
    assert projection.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 8 * 8)), rel=0.03)
    assert not projection.bias.any()


def test_positions_have_deviation_002_and_norms_begin_as_the_identity(fresh):
    for positions in (fresh.encoder.pos_embed, fresh.predictor.pos_embed):
        assert positions.std().item() == pytest.approx(0.02, rel=0.03)
    norms = [module for module in fresh.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * (2 * 2 + 1)
    for norm in norms:
        assert norm.eps == 1e-6
        assert (norm.weight == 1).all()
        assert not norm.bias.any()


def test_the_encoder_is_without_class_token_and_head(fresh):
    names = {name.split(".")[0] for name in fresh.encoder.state_dict()}
    assert names == {"pos_embed", "patch_embed", "blocks", "norm"}
    assert fresh.encoder.pos_embed.shape == (1, 64, 192)


# ----------------------------------------------------------------------------------- AIM's weights, positions


@pytest.fixture(scope="module")
def aim():
    with seeded(0):
        return NextBlockModel(
            replace(SIZES["aim-600m"], embed_dim=192, depth=2, num_heads=3, predictor_depth=2)
        )


def test_aims_linear_weights_are_xavier_uniform_by_the_width_of_each_map(aim):
    for name, module in aim.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = module.weight.chunk(3) if name.endswith("qkv") else (module.weight,)
        for part in parts:
            bound = math.sqrt(6 / (part.shape[0] + part.shape[1]))
            assert bound * 0.999 < part.abs().max().item() <= bound * 1.001
            assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert module.bias is None or not module.bias.any()


def test_aims_patch_projection_is_xavier_uniform_as_a_linear_map_of_pixels(aim):
    weight = aim.encoder.patch_embed.proj.weight
    bound = math.sqrt(6 / (3 * 14 * 14 + 192))
    assert bound * 0.999 < weight.abs().max().item() <= bound * 1.001
    assert not aim.encoder.patch_embed.proj.bias.any()


def test_aim_has_biases_in_its_norms_patch_projection_and_the_heads_ends_alone(aim):
    with_bias = {name.removesuffix(".bias") for name in aim.state_dict() if name.endswith(".bias")}
    norms = {name for name, module in aim.named_modules() if isinstance(module, nn.LayerNorm)}
    ends = {"encoder.patch_embed.proj", "predictor.projection", "predictor.block_mlps.0"}
    assert with_bias == norms | ends
    assert all(aim.get_submodule(name).eps == 1e-5 for name in norms)


def slow_sincos(row, column, dim):
    values = []
    for place in (column, row):
        angles = [place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
        values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return values


def test_fixed_positions_are_sines_and_cosines_of_column_then_row():
    expected = [slow_sincos(row, column, 24) for row in range(3) for column in range(5)]
    torch.testing.assert_close(sincos_positions((3, 5), 24)[0], torch.tensor(expected))


def test_fixed_positions_take_no_gradient_and_no_step(aim):
    for positions in (aim.encoder.pos_embed, aim.predictor.pos_embed):
        assert not positions.requires_grad
    assert torch.equal(aim.predictor.pos_embed, sincos_positions((16, 16), 2048))


def test_fixed_positions_of_another_image_size_are_computed_anew():
    model = tiny_model(positions="sincos")
    found = positions_on((5, 3), positions_of(model.encoder), model.config)
    assert torch.equal(found, sincos_positions((5, 3), 24))
    assert positions_on((4, 6), positions_of(model.encoder), model.config) is model.encoder.pos_embed
    larger, images = tiny_model(positions="sincos", image_size=(24, 32)), tiny_images(size=(24, 32))
    larger.load_state_dict(
        {**model.state_dict(), **{n: t for n, t in larger.state_dict().items() if n.endswith("pos_embed")}}
    )
    assert torch.equal(model.encode(images).tokens, larger.encode(images).tokens)
    assert torch.equal(model(images).predictions, larger(images).predictions)


# -------------------------------------------------------------------------------------------------- drop path


def test_drop_path_grows_linearly_from_zero_in_the_encoder_and_is_none_in_the_predictor():
    model = tiny_model(depth=5, drop_path=0.4)
    rates = [
        [module.drop_prob if isinstance(module, DropPath) else 0.0 for module in (b.drop_path1, b.drop_path2)]
        for b in model.encoder.blocks
    ]
    assert rates == [pytest.approx([0.1 * i, 0.1 * i]) for i in range(5)]
    assert model.predictor is not None
    assert not any(isinstance(module, DropPath) for module in model.predictor.modules())


# ------------------------------------------------------------------------------------------ recomputed layers


def run(model, *, recompute):
    """Loss, gradients, bytes kept for the backward pass, and how often each layer ran."""
    model.set_grad_checkpointing(recompute)
    model.zero_grad(set_to_none=True)
    calls, kept = [], []
    hooks = [
        layer.attn.register_forward_pre_hook(lambda module, _: calls.append(module))
        for layer in (*model.encoder.blocks, *model.predictor.blocks)
    ]

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tiny_images(), ORDER, PREFIX).loss
    kept_bytes = sum(kept)
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, kept_bytes, calls


@pytest.mark.parametrize("drop_path", [0.0, 0.6])
def test_recomputing_keeps_less_runs_every_layer_twice_and_changes_nothing(drop_path):
    model = tiny_model(depth=4, drop_path=drop_path).train()
    loss, gradients, kept_bytes, calls = run(model, recompute=False)
    other_loss, other_gradients, fewer_bytes, more_calls = run(model, recompute=True)
    assert len(calls) == 6
    assert len(more_calls) == 12
    assert all(more_calls.count(layer) == 2 for layer in calls)
    assert fewer_bytes < 0.5 * kept_bytes
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(other_gradients[name], gradient, msg=name)


# -------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_under_bf16_the_loss_is_fp32_and_near_that_of_fp32(prefix):
    model = tiny_model(num_predicted_blocks=2)
    expected = model(tiny_images(), ORDER, prefix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tiny_images(), ORDER, prefix)
    assert out.predictions.dtype == torch.bfloat16
    assert {out.loss.dtype, out.targets.dtype, out.block_loss.dtype} == {torch.float32}
    assert torch.equal(out.targets, expected.targets)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0.02, atol=0)


def test_predictor_fp32_keeps_the_predictors_layers_alone_out_of_autocast():
    model, dtypes = tiny_model(), {}
    assert model.predictor is not None
    names = (
        "encoder.blocks.1.mlp.fc2",
        "predictor.projection.2",
        "predictor.blocks.1.mlp.fc2",
        "predictor.block_mlps.0.2",
    )
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: dtypes.update([(name, torch.as_tensor(output).dtype)])
        )
    for fp32 in (True, False):
        model.predictor_fp32 = fp32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(tiny_images(), ORDER)
        layers = torch.float32 if fp32 else torch.bfloat16
        assert [dtypes[name] for name in names] == [torch.bfloat16, torch.bfloat16, layers, torch.bfloat16]
        assert out.predictions.dtype == torch.bfloat16


def test_the_result_does_not_hang_on_the_attention_kernel():
    model, images = tiny_model(), tiny_images()
    with sdpa_kernel(SDPBackend.MATH):
        plain = model(images, ORDER, PREFIX).predictions
    torch.testing.assert_close(model(images, ORDER, PREFIX).predictions, plain, atol=1e-5, rtol=1e-5)
