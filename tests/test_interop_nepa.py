"""Official NEPA files: against a restatement of the official model in plain torch, and what is refused."""

import json
import math
import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity, gelu, layer_norm, linear

from nextblock.checkpoint import CheckpointError
from nextblock.cli import main
from nextblock.interop import load, load_model
from nextblock.interop.convert import convert
from nextblock.interop.files import LoadOptions
from nextblock.interop.load import recorded_data
from nextblock.interop.nepa import read_nepa
from nextblock.models import NextBlockModel
from nextblock.models.heads import ImageClassifier
from test_load import told_by_info
from toy import tiny_images

DIM, DEPTH, HEADS, PATCH, SIDE, CLASSES = 24, 3, 3, 4, 16, 5
LAYER = "vit_nepa.encoder.layer."
ATTENTION = f"{LAYER}1.attention.attention."
CONFIG = {
    "model_type": "vit_nepa", "architectures": ["ViTNepaForPreTraining"], "hidden_size": DIM,
    "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 48, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "rope_theta": 100.0, "image_size": SIDE, "patch_size": PATCH, "num_channels": 3,
    "qkv_bias": True, "qk_norm": True, "qk_norm_affine": False, "qk_norm_bias": False,
    "layerscale_value": 1e-5, "is_causal": True, "pos_embed_rescale": 2.0, "use_gated_mlp": False,
}  # fmt: skip
IMAGES = tiny_images(3, (SIDE, SIDE))


def official(*, affine=False, layer_scale=True, classifier=False):
    """Random weights under the official names."""
    attention = {f"attention.attention.{part}": (DIM, DIM) for part in ("query", "key", "value")}
    mlp = {"intermediate.up_proj": (48, DIM), "output.dense": (DIM, 48)}
    layer = {**attention, **mlp, "attention.output.dense": (DIM, DIM)}
    layer |= {"layernorm_before": (DIM,), "layernorm_after": (DIM,)}
    maps = {f"{LAYER}{i}.{name}": shape for i in range(DEPTH) for name, shape in layer.items()}
    maps |= {"vit_nepa.embeddings.patch_embeddings.projection": (DIM, 3, PATCH, PATCH)}
    maps |= {"vit_nepa.layernorm": (DIM,)}
    maps |= {"fc_norm": (DIM,), "classifier": (CLASSES, DIM)} if classifier else {}
    shapes: dict[str, tuple[int, ...]] = {"vit_nepa.embeddings.cls_token": (1, 1, DIM)}
    for name, shape in maps.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for i in range(DEPTH):
        if affine:
            shapes |= {f"{LAYER}{i}.attention.attention.{x}_norm.weight": (8,) for x in "qk"}
        if layer_scale:
            shapes |= {f"{LAYER}{i}.{part}layer_scale.lambda1": (DIM,) for part in ("", "output.")}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def restated(weights, images, *, causal):
    """(embeddings, tokens after the final norm), class token first, as the official model computes them."""

    def part(name, i=None):
        return weights["vit_nepa." + (name if i is None else f"encoder.layer.{i}.{name}")]

    def both(name, i):
        return part(f"{name}.weight", i), part(f"{name}.bias", i)

    conv = "embeddings.patch_embeddings.projection."
    patches = torch.nn.functional.conv2d(images, part(f"{conv}weight"), part(f"{conv}bias"), stride=PATCH)
    b, n, side = len(images), SIDE // PATCH, 8
    class_token = part("embeddings.cls_token").expand(b, 1, DIM)
    embedded = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], 1)
    # Angles of patch (r, c): both centres in [-1, 1] times 2 pi times each frequency, and all of it twice.
    centres = (torch.arange(n) + 0.5) / n * 2 - 1
    frequencies = 100.0 ** -torch.arange(0, 1, 4 / side)
    angles = torch.stack([
        torch.cat([2 * math.pi * centres[r] * frequencies, 2 * math.pi * centres[c] * frequencies]).repeat(2)
        for r in range(n) for c in range(n)
    ])  # fmt: skip

    def heads(x, i, kind):
        x = linear(x, *both(f"attention.attention.{kind}", i)).view(b, -1, HEADS, side).transpose(1, 2)
        if kind == "value":
            return x
        scale = weights.get(f"{LAYER}{i}.attention.attention.{kind[0]}_norm.weight")
        x = layer_norm(x, (side,), scale, None, 1e-12)
        turned = torch.cat([-x[..., side // 2 :], x[..., : side // 2]], dim=-1)
        rotated = x[:, :, 1:] * angles.cos() + turned[:, :, 1:] * angles.sin()
        return torch.cat([x[:, :, :1], rotated], dim=2)

    hidden = embedded
    for i in range(DEPTH):
        normed = layer_norm(hidden, (DIM,), *both("layernorm_before", i), 1e-12)
        query, key, value = (heads(normed, i, kind) for kind in ("query", "key", "value"))
        scores = query @ key.transpose(-1, -2) / side**0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        branch = linear(mixed, *both("attention.output.dense", i))
        hidden = hidden + weights.get(f"{LAYER}{i}.layer_scale.lambda1", 1) * branch
        normed = layer_norm(hidden, (DIM,), *both("layernorm_after", i), 1e-12)
        branch = linear(gelu(linear(normed, *both("intermediate.up_proj", i))), *both("output.dense", i))
        hidden = hidden + weights.get(f"{LAYER}{i}.output.layer_scale.lambda1", 1) * branch
    return embedded, layer_norm(hidden, (DIM,), part("layernorm.weight"), part("layernorm.bias"), 1e-12)


def saved(directory, weights, **settings):
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **settings}))
    return directory


def read(weights, **settings) -> Any:
    return read_nepa(weights, {**CONFIG, **settings}, "FILE", LoadOptions())


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_tokens_and_loss_are_those_of_the_official_model(affine, tmp_path):
    weights = official(affine=affine)
    model = load(saved(tmp_path, weights, qk_norm_affine=affine))
    assert isinstance(model, NextBlockModel)
    config = model.config
    assert (config.block_size, config.order, config.feature_attention) == (1, "raster", "full")
    assert (config.target, config.predictor, config.rope_rescale) == ("embedding", "identity", 2.0)
    for attention in ("causal", "full"):
        _, tokens = restated(weights, IMAGES, causal=attention == "causal")
        encoded = model.encode(IMAGES, attention=attention)
        same(encoded.tokens, tokens[:, 1:])
        same(model.final_norm(encoded.prefix[-1]), tokens[:, :1])
    embedded, tokens = restated(weights, IMAGES, causal=True)
    loss = -cosine_similarity(tokens[:, :-1], embedded[:, 1:], dim=-1).mean()
    same(model(IMAGES).loss, loss + 1)
    same(model.encode(IMAGES).tokens, model.encode(IMAGES, attention="full").tokens)


def test_what_is_of_no_use_is_passed_over_and_the_prefix_may_be_absent():
    weights = official()
    expected = read(weights).encode(IMAGES).tokens
    more = {"embeddings.mask_token": torch.zeros(1, 1, DIM)}
    more |= {"rope_embeddings.inv_freq": 100.0 ** -torch.tensor([0, 0.5])}
    bare = {name.removeprefix("vit_nepa."): weight for name, weight in weights.items()}
    assert torch.equal(read(bare | more).encode(IMAGES).tokens, expected)
    with pytest.raises(CheckpointError, match="rotary frequencies of another kind"):
        read(bare | more | {"rope_embeddings.inv_freq": torch.ones(2)})


def test_a_classifier_is_the_mean_patch_after_a_norm_and_a_map(tmp_path):
    weights = official(layer_scale=False, classifier=True)
    model = load(saved(tmp_path, weights, is_causal=False, layerscale_value=None))
    assert isinstance(model, ImageClassifier)
    _, tokens = restated(weights, IMAGES, causal=False)
    norm, last = ((weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ("fc_norm", "classifier"))
    same(model(IMAGES), linear(layer_norm(tokens[:, 1:].mean(1), (DIM,), *norm, 1e-12), *last))
    convert(tmp_path, tmp_path / "own")
    again = load(tmp_path / "own")
    assert isinstance(again, ImageClassifier)
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_commands_take_it_as_any_other_model(tmp_path, capsys):
    place = saved(tmp_path / "nepa", official())
    told, data = told_by_info(capsys, place), recorded_data(place)
    assert (told["format"], told["config"]["norm_eps"]) == ("official NEPA", 1e-12)
    assert data is not None
    assert (data.mean, data.std) == ((0.5,) * 3, (0.5,) * 3)
    sources = ["--train", "digits:split=test", "--test", "digits:split=test", "--device", "cpu"]
    settings = ["--out", str(tmp_path / "knn"), "--baselines", "false", "--workers", "0", "--k", "1"]
    assert main(["knn", "--model", str(place), *sources, *settings]) == 0
    convert(place, tmp_path / "timm", to="timm")
    expected = load_model(place).encode(IMAGES).tokens
    assert torch.equal(load_model(tmp_path / "timm").encode(IMAGES).tokens, expected)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (f"{LAYER}1.output.dense.weight", None, "missing: encoder.blocks.1.mlp.fc2.weight"),
        (f"{LAYER}1.layer_scale.lambda1", None, "missing: encoder.blocks.1.gamma_1"),
        (f"{ATTENTION}key.bias", None, "lacks 'encoder.blocks.1.attn.key.bias'"),
        (f"{ATTENTION}q_norm.weight", (8,), "unexpected: encoder.blocks.1.attn.q_norm.weight"),
        ("vit_nepa.pooler.weight", (DIM, DIM), "'pooler.weight', which is not in the NEPA layout"),
        (f"{LAYER}0.intermediate.gate_proj.weight", (48, DIM), "a gated MLP (gate_proj)"),
        ("classifier.weight", (CLASSES, DIM), "a classifier of the last token (no fc_norm)"),
    ],
)  # fmt: skip
def test_missing_and_unknown_tensors_are_refused_by_name(name, shape, words):
    weights = {**official(), name: torch.zeros(shape or 1)}
    if shape is None:
        del weights[name]
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read(weights)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rope_theta", 10_000.0), ("hidden_act", "silu"), ("qkv_bias", False), ("use_gated_mlp", True)],
)
def test_settings_of_another_function_are_refused_by_name(setting, value):
    with pytest.raises(CheckpointError, match=f"{setting} is {value!r}, only"):
        read(official(), **{setting: value})


def test_a_file_without_its_config_json_is_refused(tmp_path):
    save_file(official(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"without its config\.json"):
        load(tmp_path)
