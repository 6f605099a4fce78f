"""Heads and classifiers: the slow definition, batch norm, refusals (official tensors: test_parity.py)."""

import pytest
import torch

from nextblock.models.heads import (
    AttentiveHead,
    EfficientHead,
    FeatureConfig,
    HeadConfig,
    ImageClassifier,
    LinearHead,
    last_layers,
)
from nextblock.settings import from_dict, to_dict
from toy import tiny_images, tiny_model


def head_config(num_classes, **changes):
    return HeadConfig(num_classes=num_classes, layers=(0,), **changes)


def classifier(class_names=None, layers=(1,), **changes):
    head = HeadConfig(num_classes=3, layers=layers, num_heads=3, **changes)
    return ImageClassifier(tiny_model(), head, class_names)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_attentive_head_is_attention_over_keys_and_values_of_every_patch(num_queries, bias):
    torch.manual_seed(0)
    head = AttentiveHead(12, head_config(5, num_heads=3, num_queries=num_queries, bias=bias))
    torch.nn.init.normal_(head.query)
    tokens = torch.randn(4, 7, 12)
    mean = tokens.flatten(0, 1).mean(0)
    deviation = (tokens.flatten(0, 1).var(0, unbiased=False) + 1e-6).sqrt()
    maps, expected = torch.zeros(4, 3 * num_queries, 7), torch.zeros(4, 5)
    for image in range(4):
        normed = (tokens[image] - mean) / deviation
        keys, values = normed @ head.key.weight.T, normed @ head.value.weight.T
        pooled = torch.zeros(12)
        for number in range(3 * num_queries):
            query, part = head.query[0, number // 3], slice(4 * (number % 3), 4 * (number % 3) + 4)
            maps[image, number] = torch.softmax(keys[:, part] @ query[part] / 4**0.5, dim=0)
            pooled[part] += maps[image, number] @ values[:, part] / num_queries
        expected[image] = head.linear.weight @ pooled + (head.linear.bias if bias else 0)
    torch.testing.assert_close(head(tokens), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.attention(tokens), maps)


def test_ep_head_is_one_attention_a_query_over_tokens_and_its_own_part_of_the_values():
    torch.manual_seed(0)
    head = EfficientHead(12, head_config(5, num_queries=3)).eval()
    torch.nn.init.normal_(head.query)
    tokens = torch.randn(4, 7, 12)
    maps, expected = torch.zeros(4, 3, 7), torch.zeros(4, 5)
    for image in range(4):
        normed = tokens[image] / (1 + 1e-6) ** 0.5  # by the first running mean and deviation
        values, pooled = normed @ head.value.weight.T, torch.zeros(12)
        for query in range(3):
            maps[image, query] = torch.softmax(normed @ head.query[query] / 12**0.5, dim=0)
            part = slice(4 * query, 4 * query + 4)
            pooled[part] = maps[image, query] @ values[:, part]
        expected[image] = head.linear.weight @ pooled + head.linear.bias
    torch.testing.assert_close(head(tokens), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.attention(tokens), maps)


@pytest.mark.parametrize(
    "head",
    [
        kind(8, head_config(3, num_heads=2, num_queries=2))
        for kind in (AttentiveHead, EfficientHead, LinearHead)
    ],
)
def test_batch_norm_uses_running_statistics_only_in_evaluation(head):
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) + 4
    features = features if isinstance(head, LinearHead) else features[:, None].repeat(1, 3, 1)
    in_training = head.train()(features)
    head.eval()
    one_by_one = torch.cat([head(image[None]) for image in features])
    torch.testing.assert_close(head(features), one_by_one)
    assert not torch.allclose(head(features), in_training, atol=1e-2)
    for _ in range(300):
        head.norm.train()(features[:, 0] if features.ndim == 3 else features)
    head.norm.get_buffer("running_var").mul_(5 / 6)  # running variances are unbiased, a batch's own is not
    torch.testing.assert_close(head.eval()(features), in_training, atol=1e-3, rtol=1e-3)


def test_settings_of_a_head_that_older_files_hold_are_read():
    old = {"kind": "attentive", "num_classes": 10, "layers": [1, 2], "layer_pool": "mean", "num_heads": 4}
    head = from_dict(HeadConfig, old)
    assert head == HeadConfig(num_classes=10, layers=(1, 2), num_heads=4)
    assert head.features == FeatureConfig(layers=(1, 2), pooled=False)
    assert from_dict(HeadConfig, to_dict(head)) == head


def test_attention_of_the_head_config_reaches_the_encoder():
    native, causal, full = (
        classifier(attention=attention).features(tiny_images()) for attention in ("native", "causal", "full")
    )
    assert torch.equal(native, causal)
    assert not torch.allclose(full, causal, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: AttentiveHead(32, head_config(10, num_heads=5)),
            "32 channels cannot have 5 attention heads",
        ),
        (lambda: EfficientHead(32, head_config(10, num_queries=5)), "32 channels cannot have 5 queries"),
        (lambda: head_config(0), "num_classes is 0"),
        (lambda: HeadConfig(num_classes=2, layers=()), "at least one encoder layer"),
        (lambda: classifier(layers=(2,)), r"layers \[2\] of an encoder with 2"),
        (lambda: classifier(["cat", "dog"]), "2 class names for a head of 3 classes"),
        (lambda: last_layers(5, 4), "last 5 layers of an encoder with 4"),
    ],
)
def test_impossible_heads_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
