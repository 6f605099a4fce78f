"""Adapters: where they lie, that they begin as nothing, and that merging them changes nothing."""

import sys
from typing import Any

import pytest
import timm
import torch

from nextblock.evaluate.finetune.lora import MissingPeftError, add_lora, merge_lora
from toy import one_thread, tiny_images, tiny_model, toy_model  # noqa: F401 - a fixture

SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "seed": 0}


def adapted(seed=0, *, stirred=True) -> Any:
    """A toy model with adapters, which add something if `stirred`."""
    model = toy_model()
    add_lora(model.encoder, **{**SETTINGS, "seed": seed})
    if stirred:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def test_adapters_lie_on_qkv_and_proj_of_every_layer_and_nowhere_else():
    trained = {name for name, p in adapted().named_parameters() if p.requires_grad}
    assert trained == {
        f"encoder.blocks.{layer}.attn.{part}.lora_{side}.default.weight"
        for layer in (0, 1)
        for part in ("qkv", "proj")
        for side in "AB"
    }


def test_the_patch_embedding_has_no_adapter():
    assert type(adapted().encoder.patch_embed.proj) is torch.nn.Conv2d


def test_fresh_adapters_add_nothing():
    images = tiny_images(size=(16, 16))
    before = toy_model().encode(images).tokens
    assert torch.equal(adapted(stirred=False).encode(images).tokens, before)


def test_an_adapted_map_is_the_frozen_one_plus_a_product_of_rank_r():
    model = adapted()
    layer = model.encoder.blocks[1].attn.qkv
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((2, 32), (96, 2))
    weight = layer.base_layer.weight + 4.0 / 2 * (b @ a)
    assert torch.allclose(layer(x), x @ weight.T + layer.base_layer.bias, atol=1e-6)


def test_merged_adapters_are_the_same_function_in_a_plain_network():
    images = tiny_images(size=(16, 16))
    model = adapted()
    with torch.no_grad():
        before, untouched = model.encode(images).tokens, toy_model().encode(images).tokens
        merge_lora(model.encoder)
        after = model.encode(images).tokens
    assert model.state_dict().keys() == toy_model().state_dict().keys()
    assert torch.allclose(after, before, atol=1e-5)
    assert not torch.allclose(after, untouched, atol=1e-2)


def test_the_same_seed_gives_the_same_adapters_and_leaves_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (adapted(seed, stirred=False).state_dict() for seed in (0, 0, 1))
    name = "encoder.blocks.0.attn.qkv.lora_A.default.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_whose_qkv_is_no_layer_of_its_own_is_refused():
    encoder: Any = timm.create_model(
        "beit_base_patch16_224", num_classes=0, depth=1, embed_dim=24, num_heads=2
    )
    with pytest.raises(
        ValueError, match=r"of timm's VisionTransformer, and this Beit has another kind.*lora\.rank 0"
    ):
        add_lora(encoder, **SETTINGS)


def test_without_peft_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPeftError, match=r"pip install peft"):
        add_lora(tiny_model().encoder, **SETTINGS)
