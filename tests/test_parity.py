"""The reference: same weights, same outputs as the official implementation's, and the same training."""

from __future__ import annotations

import re

import pytest
import torch

from nextblock.blocks import unpatchify
from nextblock.checkpoint import CheckpointError
from nextblock.config import OptimConfig
from nextblock.interop import load
from nextblock.models import NextBlockModel
from nextblock.models.classifier import ImageClassifier
from nextblock.objective import normalize_blocks
from nextblock.optim import build_optimizer, lr_at, set_lr

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


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_loaded_for_use_in_fp32(name, load_golden):
    model = load_golden(name)
    assert isinstance(model, NextBlockModel)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
