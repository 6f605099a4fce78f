"""Heads and classifiers: golden parity, the slow definition, batch norm, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nextblock.config import ModelConfig
from nextblock.models.heads import (
    AttentiveHead,
    FeatureConfig,
    HeadConfig,
    ImageClassifier,
    LinearHead,
    last_layers,
    pool_features,
)
from nextblock.models.next_block import NextBlockModel
from nextblock.models.vit import Encoded
from nextblock.settings import from_dict, to_dict
from toy import one_thread  # noqa: F401 - a fixture

GOLDEN = Path(__file__).parent / "golden"
NANO = ModelConfig(
    image_size=64, patch_size=8, block_size=2, embed_dim=48, depth=4, num_heads=3, predictor=None
)
ATTENTIVE = HeadConfig(num_classes=10, layers=(1, 2, 3), num_heads=4)
LINEAR = HeadConfig(kind="linear", num_classes=10, layers=(3,))
ATTENTIVE_KEYS = {
    "classifier.cls_token": "query",
    "classifier.k.weight": "key.weight",
    "classifier.v.weight": "value.weight",
    "classifier.bn": "norm",
    "classifier.linear": "linear",
}
LINEAR_KEYS = {"classifier.0": "norm", "classifier.1": "linear"}


def golden_head(name, keys):
    """The head weights of a golden classifier under our names, its encoder's, and its tensors."""
    state = torch.load(GOLDEN / f"{name}.ckpt", weights_only=True)["state_dict"]
    head = {}
    for theirs, ours in keys.items():
        head |= {k.replace(theirs, ours): v for k, v in state.items() if k.startswith(theirs)}
    encoder = {k.removeprefix("enc."): v for k, v in state.items() if k.startswith("enc.")}
    return head, encoder, load_file(GOLDEN / f"{name}.safetensors")


CASES = [("attentive_probe", ATTENTIVE, ATTENTIVE_KEYS), ("linear_probe", LINEAR, LINEAR_KEYS)]


@pytest.mark.parametrize(("name", "config", "keys"), CASES)
def test_classifiers_give_the_official_features_and_logits(name, config, keys):
    head, encoder, tensors = golden_head(name, keys)
    classifier = ImageClassifier(NextBlockModel(NANO), config, [str(digit) for digit in range(10)]).eval()
    classifier.head.load_state_dict(head)
    classifier.encoder_model.encoder.load_state_dict(encoder)
    with torch.no_grad():
        features = classifier.features(tensors["images"])
        logits = classifier(tensors["images"])
    torch.testing.assert_close(features, tensors["features"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_attentive_head_is_attention_over_keys_and_values_of_every_patch(num_queries, bias):
    torch.manual_seed(0)
    head = AttentiveHead(12, 5, num_heads=3, num_queries=num_queries, bias=bias)
    torch.nn.init.normal_(head.query)
    tokens = torch.randn(4, 7, 12)
    mean = tokens.flatten(0, 1).mean(0)
    deviation = (tokens.flatten(0, 1).var(0, unbiased=False) + 1e-6).sqrt()
    expected = torch.zeros(4, 5)
    for image in range(4):
        normed = (tokens[image] - mean) / deviation
        keys, values = normed @ head.key.weight.T, normed @ head.value.weight.T
        pooled = torch.zeros(12)
        for query in head.query[0]:
            for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
                weights = torch.softmax(keys[:, part] @ query[part] / 4**0.5, dim=0)
                pooled[part] += weights @ values[:, part] / num_queries
        expected[image] = head.linear.weight @ pooled + (head.linear.bias if bias else 0)
    torch.testing.assert_close(head(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", [AttentiveHead(8, 3, num_heads=2), LinearHead(8, 3)])
def test_batch_norm_uses_running_statistics_only_in_evaluation(head):
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) + 4
    features = features[:, None].repeat(1, 3, 1) if isinstance(head, AttentiveHead) else features
    head.train()
    in_training = head(features)
    head.eval()
    one_by_one = torch.cat([head(image[None]) for image in features])
    torch.testing.assert_close(head(features), one_by_one)
    assert not torch.allclose(head(features), in_training, atol=1e-2)
    for _ in range(300):
        head.norm.train()(features[:, 0] if features.ndim == 3 else features)
    head.norm.get_buffer("running_var").mul_(5 / 6)  # running variances are unbiased, a batch's own is not
    torch.testing.assert_close(head.eval()(features), in_training, atol=1e-3, rtol=1e-3)


def test_layers_are_averaged_or_joined_after_the_norm_if_one_is_given():
    layers = tuple(torch.full((2, 3, 4), float(layer)) for layer in range(5))
    encoded = Encoded(layers[-1], layers)
    mean = FeatureConfig(layers=(1, 4), pooled=False)
    joined = replace(mean, layer_pool="concat", norm_layers=True)
    assert torch.equal(pool_features(encoded, mean, torch.exp), torch.full((2, 3, 4), 2.5))
    expected = torch.cat([torch.full((2, 3, 4), 10.0), torch.full((2, 3, 4), 40.0)], -1)
    assert torch.equal(pool_features(encoded, joined, lambda tokens: tokens * 10), expected)


def test_settings_of_a_head_that_older_files_hold_are_read():
    old = {"kind": "attentive", "num_classes": 10, "layers": [1, 2], "layer_pool": "mean", "num_heads": 4}
    head = from_dict(HeadConfig, old)
    assert head == HeadConfig(num_classes=10, layers=(1, 2), num_heads=4)
    assert head.features == FeatureConfig(layers=(1, 2), pooled=False)
    assert from_dict(HeadConfig, to_dict(head)) == head


def test_attention_of_the_head_config_reaches_the_encoder():
    model = NextBlockModel(NANO).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = {
        attention: ImageClassifier(
            model, HeadConfig(num_classes=3, layers=(3,), num_heads=3, attention=attention)
        ).features(images)
        for attention in ("native", "causal", "full")
    }
    assert torch.equal(features["native"], features["causal"])
    assert not torch.allclose(features["full"], features["causal"], atol=1e-4)


def test_last_layers_are_counted_from_zero():
    assert last_layers(6, 12) == (6, 7, 8, 9, 10, 11)
    assert last_layers(1, 4) == (3,)
    with pytest.raises(ValueError, match="last 5 layers of an encoder with 4"):
        last_layers(5, 4)


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="32 channels wide cannot have 5 attention heads"):
        AttentiveHead(32, 10, num_heads=5)
    with pytest.raises(ValueError, match="num_classes is 0"):
        HeadConfig(num_classes=0, layers=(1,))
    with pytest.raises(ValueError, match="at least one encoder layer"):
        HeadConfig(num_classes=2, layers=())
    with pytest.raises(ValueError, match=r"layers \[4\] of an encoder with 4"):
        ImageClassifier(NextBlockModel(NANO), HeadConfig(kind="linear", num_classes=2, layers=(4,)))
    with pytest.raises(ValueError, match="2 class names for a head of 10 classes"):
        ImageClassifier(NextBlockModel(NANO), LINEAR, ["cat", "dog"])
