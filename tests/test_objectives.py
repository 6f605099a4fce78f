"""Embeddings, features and masked blocks: NEPA's loss, rotary positions, features, noise."""

import pytest
import torch
from torch.nn.functional import conv2d, layer_norm
from torch.testing import assert_close

from nextblock.blocks import patchify
from nextblock.models.vit import rotary_positions
from test_next_block import (
    CLASS,
    EMBEDDING,
    FEATURES,
    IMAGES,
    KERNEL,
    NEPA,
    PER_IMAGE,
    ROPE,
    gradients,
    model_of,
    slow_encoding,
    timms_rope,
)
from toy import tiny_config, tiny_images


def test_nepas_objective_is_ours_less_one():
    model = model_of(**NEPA, norm_eps=1e-5)
    images, encoder = tiny_images(3, (8, 12)), model.encoder
    clean = torch.stack([encoder.patch_embed.proj.weight.flatten(1) @ p for p in patchify(images, (4, 4)).mT])
    clean = clean.mT + encoder.patch_embed.proj.bias
    hidden = torch.cat([encoder.cls_token.expand(3, -1, -1), clean], dim=1)
    for layer in encoder.blocks:
        hidden = layer(hidden, rope=timms_rope(model.config), is_causal=True)
    hidden = layer_norm(hidden, (24,), encoder.norm.weight, encoder.norm.bias, 1e-5)
    one, other = (x / x.norm(dim=-1, keepdim=True) for x in (hidden[:, :-1], clean.detach()))
    loss = -(one * other).sum(-1).mean()
    assert_close(model(images).loss - 1, loss, atol=1e-6, rtol=0)
    theirs = gradients(model, loss)
    for name, gradient in gradients(model, model(images).loss).items():
        assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("grid", [(2, 3), (5, 1), (7, 7)])
def test_rotary_positions_are_those_of_timm_and_a_scale_stretches_them(grid):
    config = tiny_config(image_size=(4 * grid[0], 4 * grid[1]), block_size=1, num_heads=2, embed_dim=32)
    assert_close(rotary_positions(grid, 16), timms_rope(config))
    # Half the angles: sin 2a = 2 sin a cos a.
    sines, cosines = rotary_positions(grid, 16, torch.tensor(0.5)).chunk(2, dim=1)
    assert_close(rotary_positions(grid, 16)[:, :16], 2 * sines * cosines, atol=1e-5, rtol=1e-5)


def test_a_scale_of_rotary_positions_reaches_the_encoder():
    model, images = model_of(**NEPA), tiny_images(2, (8, 12))
    assert not torch.equal(model(images, rope_scale=torch.tensor(1.5)).loss, model(images).loss)


@pytest.mark.parametrize("changes", [{**ROPE, **CLASS}, {**ROPE, "layer_scale": None}, CLASS], ids=str)
@torch.no_grad()
def test_the_encoder_by_itself_is_encoding_without_a_mask(changes):
    model = model_of(**changes)
    q = int(model.config.class_token)
    found, alone = model.encode(IMAGES, "full"), model.encoder(IMAGES)
    assert_close(alone[:, q:], found.tokens, atol=1e-5, rtol=1e-5)
    assert found.has_class_token == bool(q) == (len(found.prefix) == 2)
    if q:
        assert_close(alone[:, :1], model.final_norm(found.prefix[-1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"order": "random", "order_seed": 4}, {**ROPE, **CLASS, **PER_IMAGE}, CLASS], ids=str
)
@torch.no_grad()
def test_without_an_order_the_models_first_decides_what_is_seen_and_a_class_token_comes_before_it(changes):
    model = model_of(**changes)
    first, q = model.orders[0], int(model.config.class_token)
    assert (first.tolist() == list(range(6))) == (changes == CLASS)
    assert torch.equal(model(IMAGES).predictions, model(IMAGES, first).predictions)
    expected = slow_encoding(model, IMAGES, first.tolist())[:, q:]
    assert_close(model.encode(IMAGES, "causal").tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{**EMBEDDING, **ROPE, "layer_scale": None}, EMBEDDING], ids=str)
def test_layers_add_in_fp32_under_autocast(changes):
    model, seen = model_of(**changes), []
    for layer in model.encoder.blocks:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
        model.encode(IMAGES)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("changes", [{}, EMBEDDING, FEATURES], ids=["pixels", "embedding", "features"])
@pytest.mark.parametrize("leaks", [False, True])
def test_noise_is_predicted_only_under_a_mask_that_shows_it(changes, leaks):
    """Why a mask's polarity matters: inverted, it shows what is to be predicted, and copying is learned."""
    one_layer = {"depth": 1, "embed_dim": 32, "num_heads": 2, "predictor": "linear", "block_mlp_dim": None}
    model = model_of(image_size=8, block_size=1, in_chans=1, **one_layer, **changes).train()
    if changes is FEATURES:  # of each patch alone: a coarser teacher would show one patch in the next
        kernel = KERNEL[:, :1, :4, :4]
        model.targets.teacher = lambda images: conv2d(images, kernel, stride=4)
    model.encoder.patch_embed.requires_grad_(requires_grad=False)
    if leaks:
        model.mask.fill_(value=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(80):
        loss = model(torch.randn(16, 1, 8, 8, generator=generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    targets = model.targets_of(torch.randn(256, 1, 8, 8, generator=generator), model.orders[0])
    references = {name: loss.mean().item() for name, loss in model.targets.reference_losses(targets).items()}
    share = sum(losses[-20:]) / 20 / references["mean" if changes else "zero"]
    assert share < 0.95 if leaks else share > 0.98
