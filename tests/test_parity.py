"""The reference: same weights, same outputs as the official implementation's, and the same training."""

import pytest
import torch
from einops import rearrange
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.testing import assert_close

from nextblock.blocks import may_attend, normalize_blocks, unpatchify
from nextblock.config import OptimConfig
from nextblock.interop import load
from nextblock.models.vit import embed_patches
from nextblock.optim import build_optimizer, lr_at, set_lr

LOSS = {"atol": 1e-5, "rtol": 0}
TENSOR = {"atol": 1e-4, "rtol": 0}
TEN_STEPS = {"atol": 2e-4, "rtol": 0}


@pytest.fixture
def load_golden(golden_dir):
    """`load_golden("xtra_k2.ckpt")`: the official file as our model; no file tells its three heads."""
    return lambda file, num_heads=3, **settings: load(golden_dir / file, num_heads=num_heads, **settings)


@pytest.mark.parametrize("name", ["xtra_k2", "causal_k1"])
@torch.no_grad()
def test_loss_predictions_targets_tokens_and_the_last_layers_are_the_official_ones(name, golden, load_golden):
    expected, model = golden(name), load_golden(f"{name}.ckpt")
    out = model(expected["images"])
    assert_close(out.loss, expected["loss"].squeeze(), **LOSS)
    # the official last row predicts nothing, as no block follows
    assert_close(out.predictions, expected["predictions"][:, :-1], **TENSOR)

    pixels = expected["targets"].flatten(2)
    assert_close(out.targets, normalize_blocks(pixels)[:, 1:], **TENSOR)
    whole = unpatchify(pixels, model.config.block_grid, model.config.block_px)
    assert torch.equal(whole, expected["images"])

    encoded = model.encode(expected["images"])
    assert_close(encoded.tokens, expected["encoder_tokens"], **TENSOR)
    assert_close(torch.stack(encoded.layers[-3:]), expected["last_blocks_tokens"], **TENSOR)


def test_ten_training_steps_are_the_official_ones(golden, golden_metadata, load_golden):
    expected, metadata = golden("xtra_k2"), golden_metadata("xtra_k2")
    model = load_golden("xtra_k2.ckpt").train()
    optim = OptimConfig(lr=1e-3, start_lr=1e-4, end_lr=1e-6, weight_decay=0.05, betas=(0.9, 0.95))
    optimizer = build_optimizer(model, optim)
    steps = {name: int(metadata[name]) for name in ("warmup_steps", "total_steps")}
    losses, grad_norms, lrs = [], [], []
    for step, images in enumerate(expected["train_images"]):
        lrs.append(lr_at(step, peak=optim.lr, start=optim.start_lr, end=optim.end_lr, **steps))
        set_lr(optimizer, lrs[-1])
        loss = model(images).loss
        loss.backward()
        assert optim.clip_grad is not None
        grad_norms.append(clip_grad_norm_(model.parameters(), optim.clip_grad).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(losses) == 10
    assert_close(torch.tensor(lrs).double(), expected["train_lrs"], atol=1e-9, rtol=0)
    assert_close(torch.tensor(losses).double(), expected["train_losses"], **LOSS)
    assert_close(torch.tensor(grad_norms).double(), expected["train_grad_norms"], **TENSOR)
    assert_close(model.encoder.pos_embed, expected["final_pos_embed"], **TEN_STEPS)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("attentive_probe", {"layers": (1, 2, 3), "layer_pool": "mean", "num_heads": 4, "num_queries": 1}),
        ("linear_probe", {"layers": (3,)}),
    ],
)
@torch.no_grad()
def test_features_logits_and_settings_of_a_probe_are_the_official_ones(name, settings, golden, load_golden):
    expected, classifier = golden(name), load_golden(f"{name}.ckpt")
    assert_close(classifier.features(expected["images"]), expected["features"], **TENSOR)
    assert_close(classifier(expected["images"]), expected["logits"], **TENSOR)
    settings |= {"kind": name.removesuffix("_probe"), "num_classes": 10}
    assert {key: getattr(classifier.head_config, key) for key in settings} == settings


def patch_tokens(model, images):
    return embed_patches(model.encoder, images) + model.encoder.pos_embed


@torch.no_grad()
def test_aims_patches_prefix_attention_layers_and_logits_are_the_official_ones(
    golden, golden_dir, load_golden
):
    expected, head = golden("aim_nano"), {"head": golden_dir / "aim_nano_head.pth", "probe_layers": (1, 2)}
    model = load_golden("aim_nano_backbone.pth", image_size=56)
    tokens, layer = patch_tokens(model, expected["images"]), model.encoder.blocks[0]
    assert_close(tokens, expected["embedded_tokens"], **TENSOR)
    prefix, none = (may_attend(torch.arange(16), *n) for n in ([expected["prefix_lengths"]], []))
    official = expected["prefix_attention_block0"]
    assert_close(layer.attn(layer.norm1(tokens), attn_mask=prefix), official, **TENSOR)
    assert (layer.attn(layer.norm1(tokens), attn_mask=none) - official).abs().max() > 0.01
    layers = torch.stack(model.encode(expected["images"]).layers)
    assert_close(layers, expected["layer_features"], **TENSOR)
    classifier = load_golden("aim_nano_backbone.pth", **head)
    assert_close(classifier(expected["images"]), expected["logits"], **TENSOR)


def test_aims_mask_encoder_loss_predictions_and_gradient_in_training_are_the_official_ones(
    golden, load_golden
):
    expected = golden("aim_pretrain_nano")
    model = load_golden("aim_pretrain_nano_weights.safetensors").train()
    mask = may_attend(torch.arange(16), expected["prefix_lengths"])
    assert torch.equal(mask.squeeze(1), expected["attention_allowed"].bool())
    assert_close(patch_tokens(model, expected["images"]), expected["embedded_tokens"], **TENSOR)
    seen = []
    model.encoder.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    out = model(expected["images"], prefix_lengths=expected["prefix_lengths"])
    # the last patch is left out; no token outside the prefix sees it
    assert_close(seen[0], expected["encoder_tokens"][:, :-1], **TENSOR)

    assert_close(out.loss, expected["loss"].squeeze(), **LOSS)
    first_kept = [row.nonzero()[0].item() + 1 for row in out.kept]  # the target of row i is patch i+1
    assert first_kept == expected["prefix_lengths"].tolist()
    official = rearrange(expected["predictions"], "b n (h w c) -> b n (c h w)", h=14, w=14)[:, :-1]
    assert_close(out.predictions[out.kept], official[out.kept], **TENSOR)

    out.loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.endswith("pos_embed") for name in trainable)
    gradients = [p.grad for p in trainable.values() if p.grad is not None]
    assert len(gradients) == len(trainable)
    assert_close(get_total_norm(gradients), expected["grad_norm"].squeeze(), **TENSOR)
