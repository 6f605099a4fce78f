"""The reference: same weights, same outputs as the official implementation's, and the same training."""

from __future__ import annotations

import re

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm

from nextblock.blocks import may_attend, unpatchify
from nextblock.checkpoint import CheckpointError
from nextblock.config import OptimConfig
from nextblock.interop import load
from nextblock.interop.aim import read_aim
from nextblock.interop.files import LoadOptions
from nextblock.models import NextBlockModel
from nextblock.models.heads import ImageClassifier
from nextblock.models.vit import patch_tokens
from nextblock.optim import build_optimizer, lr_at, set_lr
from nextblock.targets import normalize_blocks

LOSS = {"atol": 1e-5, "rtol": 0}
TENSOR = {"atol": 1e-4, "rtol": 0}
TEN_STEPS = {"atol": 2e-4, "rtol": 0}

MODELS = ["xtra_k2", "causal_k1"]
PROBES = ["attentive_probe", "linear_probe"]


@pytest.fixture
def load_golden(golden_dir):
    """`load_golden("xtra_k2")`: the official file as our model; no file tells its three heads."""
    return lambda name, num_heads=3: load(golden_dir / f"{name}.ckpt", num_heads=num_heads)


# ----------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_loss_and_predictions_are_the_official_ones(name, golden, load_golden):
    expected, model = golden(name), load_golden(name)
    out = model(expected["images"])
    torch.testing.assert_close(out.loss, expected["loss"].squeeze(), **LOSS)
    # the official last row predicts nothing, as no block follows
    torch.testing.assert_close(out.predictions, expected["predictions"][:, :-1], **TENSOR)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_targets_are_the_official_blocks_normalised(name, golden, load_golden):
    expected, model = golden(name), load_golden(name)
    out = model(expected["images"])
    pixels = expected["targets"].flatten(2)
    torch.testing.assert_close(out.targets, normalize_blocks(pixels)[:, 1:], **TENSOR)
    whole = unpatchify(pixels, model.config.block_grid, model.config.block_px)
    assert torch.equal(whole, expected["images"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_and_the_last_layers_are_the_official_ones(name, golden, load_golden):
    expected, model = golden(name), load_golden(name)
    encoded = model.encode(expected["images"])
    torch.testing.assert_close(encoded.tokens, expected["encoder_tokens"], **TENSOR)
    torch.testing.assert_close(torch.stack(encoded.layers[-3:]), expected["last_blocks_tokens"], **TENSOR)


def test_sizes_and_settings_are_read_from_the_file(load_golden):
    config = load_golden("xtra_k2").config
    assert (config.image_size, config.patch_size, config.block_size) == (64, 8, 2)
    assert (config.embed_dim, config.depth, config.num_heads, config.mlp_ratio) == (48, 4, 3, 4.0)
    assert (config.projection_dim, config.predictor_dim, config.block_mlp_dim) == (96, 36, 128)
    assert (config.predictor_depth, config.predictor_heads, config.num_predicted_blocks) == (2, 3, 1)
    assert load_golden("causal_k1").config.block_size == 1  # though enc_block_size says 2


def test_ten_training_steps_are_the_official_ones(golden, golden_metadata, load_golden):
    expected, metadata = golden("xtra_k2"), golden_metadata("xtra_k2")
    model = load_golden("xtra_k2").train()
    optim = OptimConfig(lr=1e-3, start_lr=1e-4, end_lr=1e-6, weight_decay=0.05, betas=(0.9, 0.95))
    optimizer = build_optimizer(model, optim)
    losses, grad_norms, lrs = [], [], []
    for step, images in enumerate(expected["train_images"]):
        lrs.append(
            lr_at(
                step,
                peak=optim.lr,
                start=optim.start_lr,
                end=optim.end_lr,
                warmup_steps=int(metadata["warmup_steps"]),
                total_steps=int(metadata["total_steps"]),
            )
        )
        set_lr(optimizer, lrs[-1])
        loss = model(images).loss
        loss.backward()
        assert optim.clip_grad is not None
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(losses) == 10
    torch.testing.assert_close(torch.tensor(lrs).double(), expected["train_lrs"], atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.tensor(losses).double(), expected["train_losses"], **LOSS)
    torch.testing.assert_close(torch.tensor(grad_norms).double(), expected["train_grad_norms"], **TENSOR)
    torch.testing.assert_close(model.encoder.pos_embed, expected["final_pos_embed"], **TEN_STEPS)


# ----------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("name", PROBES)
@torch.no_grad()
def test_features_and_logits_of_a_probe_are_the_official_ones(name, golden, load_golden):
    expected, classifier = golden(name), load_golden(name)
    assert isinstance(classifier, ImageClassifier)
    torch.testing.assert_close(classifier.features(expected["images"]), expected["features"], **TENSOR)
    torch.testing.assert_close(classifier(expected["images"]), expected["logits"], **TENSOR)


def test_the_heads_are_those_of_the_files(load_golden):
    attentive, linear = (load_golden(name).head_config for name in PROBES)
    assert (attentive.kind, attentive.layers, attentive.layer_pool) == ("attentive", (1, 2, 3), "mean")
    assert (attentive.num_heads, attentive.num_queries, attentive.num_classes) == (4, 1, 10)
    assert (linear.kind, linear.layers, linear.num_classes) == ("linear", (3,), 10)


# -------------------------------------------------------------------------------------------------------- AIM


@pytest.fixture
def aim_encoder(golden_dir):
    """The official backbone as our model of 56-px images."""
    backbone = torch.load(golden_dir / "aim_nano_backbone.pth", weights_only=True)
    return read_aim(backbone, "aim_nano_backbone.pth", LoadOptions(num_heads=3, image_size=56))


@pytest.fixture
def aim_model(golden_dir):
    """The model of the training code, with its prediction head."""
    weights = load_file(golden_dir / "aim_pretrain_nano_weights.safetensors")
    return read_aim(weights, "aim_pretrain_nano_weights.safetensors", LoadOptions(num_heads=3))


@torch.no_grad()
def test_aims_embedded_patches_and_layers_are_the_official_ones(golden, aim_encoder):
    expected = golden("aim_nano")
    embedded = patch_tokens(aim_encoder.encoder, expected["images"], aim_encoder.config)
    torch.testing.assert_close(embedded, expected["embedded_tokens"], **TENSOR)
    layers = torch.stack(aim_encoder.encode(expected["images"]).layers)
    torch.testing.assert_close(layers, expected["layer_features"], **TENSOR)


@torch.no_grad()
def test_aims_logits_are_the_official_ones(golden, golden_dir):
    expected = golden("aim_nano")
    backbone, head = (
        torch.load(golden_dir / f"aim_nano_{part}.pth", weights_only=True) for part in ("backbone", "head")
    )
    classifier = read_aim(backbone, "backbone", LoadOptions(num_heads=3, probe_layers=(1, 2)), head)
    torch.testing.assert_close(classifier(expected["images"]), expected["logits"], **TENSOR)


@torch.no_grad()
def test_aims_attention_under_a_prefix_is_the_official_one(golden, aim_encoder):
    expected = golden("aim_nano")
    tokens = patch_tokens(aim_encoder.encoder, expected["images"], aim_encoder.config)
    layer = aim_encoder.encoder.blocks[0]
    mask = may_attend(torch.arange(16), expected["prefix_lengths"])
    attended = layer.attn(layer.norm1(tokens), attn_mask=mask)
    torch.testing.assert_close(attended, expected["prefix_attention_block0"], **TENSOR)
    without = layer.attn(layer.norm1(tokens), attn_mask=may_attend(torch.arange(16)))
    assert (without - expected["prefix_attention_block0"]).abs().max() > 0.01


def test_who_may_attend_under_aims_prefix_is_the_official_answer(golden):
    expected = golden("aim_pretrain_nano")
    mask = may_attend(torch.arange(16), expected["prefix_lengths"])
    assert torch.equal(mask.squeeze(1), expected["attention_allowed"].bool())


@torch.no_grad()
def test_aims_encoder_in_training_is_the_official_one(golden, aim_model):
    expected = golden("aim_pretrain_nano")
    embedded = patch_tokens(aim_model.encoder, expected["images"], aim_model.config)
    torch.testing.assert_close(embedded, expected["embedded_tokens"], **TENSOR)
    seen = []
    aim_model.encoder.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    aim_model(expected["images"], prefix_lengths=expected["prefix_lengths"])
    # the last patch is left out; no token outside the prefix sees it
    torch.testing.assert_close(seen[0], expected["encoder_tokens"][:, :-1], **TENSOR)


@torch.no_grad()
def test_aims_loss_and_predictions_are_the_official_ones(golden, aim_model):
    expected = golden("aim_pretrain_nano")
    out = aim_model(expected["images"], prefix_lengths=expected["prefix_lengths"])
    torch.testing.assert_close(out.loss, expected["loss"].squeeze(), **LOSS)
    first_kept = [row.nonzero()[0].item() + 1 for row in out.kept]  # the target of row i is patch i+1
    assert first_kept == expected["prefix_lengths"].tolist()
    official = rearrange(expected["predictions"], "b n (h w c) -> b n (c h w)", h=14, w=14)[:, :-1]
    torch.testing.assert_close(out.predictions[out.kept], official[out.kept], **TENSOR)


def test_aims_gradient_is_as_long_as_the_official_one(golden, aim_model):
    expected = golden("aim_pretrain_nano")
    aim_model.train()
    aim_model(expected["images"], prefix_lengths=expected["prefix_lengths"]).loss.backward()
    trainable = {name: p for name, p in aim_model.named_parameters() if p.requires_grad}
    assert not any(name.endswith("pos_embed") for name in trainable)
    gradients = [p.grad for p in trainable.values() if p.grad is not None]
    assert len(gradients) == len(trainable)
    torch.testing.assert_close(get_total_norm(gradients), expected["grad_norm"].squeeze(), **TENSOR)


# -------------------------------------------------------------------------------- what the reference can tell


@torch.no_grad()
def test_a_wrong_number_of_heads_shows_in_the_tokens_and_not_in_the_loss(golden, load_golden):
    expected = golden("xtra_k2")
    wrong = load_golden("xtra_k2", num_heads=4)
    assert (wrong.encode(expected["images"]).tokens - expected["encoder_tokens"]).abs().max() > 1e-3
    torch.testing.assert_close(wrong(expected["images"]).loss, expected["loss"].squeeze(), **LOSS)


@torch.no_grad()
def test_attention_without_the_mask_shows_in_the_tokens(golden, load_golden):
    expected = golden("xtra_k2")
    full = load_golden("xtra_k2").encode(expected["images"], attention="full").tokens
    assert (full - expected["encoder_tokens"]).abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS + PROBES)
def test_a_file_that_does_not_tell_its_heads_is_refused_asking_for_them(name, load_golden):
    with pytest.raises(CheckpointError, match=re.escape("give it as num_heads=")):
        load_golden(name, num_heads=None)


@torch.no_grad()
def test_a_wrong_number_of_aims_heads_shows_in_the_layers(golden, golden_dir):
    expected = golden("aim_nano")
    backbone = torch.load(golden_dir / "aim_nano_backbone.pth", weights_only=True)
    wrong = read_aim(backbone, "backbone", LoadOptions(num_heads=4))
    assert isinstance(wrong, NextBlockModel)
    layers = torch.stack(wrong.encode(expected["images"]).layers)
    assert (layers - expected["layer_features"]).abs().max() > 1e-3


@torch.no_grad()
def test_aims_extra_norm_shows_in_the_predictions(golden, golden_dir):
    expected = golden("aim_pretrain_nano")
    weights = load_file(golden_dir / "aim_pretrain_nano_weights.safetensors")
    prefix = {"prefix_lengths": expected["prefix_lengths"]}
    right = read_aim(weights, "weights", LoadOptions(num_heads=3))(expected["images"], **prefix)
    plain = {name: w for name, w in weights.items() if "decoder_blocks" not in name or "norm_1" not in name}
    without = read_aim(plain, "weights", LoadOptions(num_heads=3))(expected["images"], **prefix)
    assert (without.predictions - right.predictions).abs().max() > 0.01
