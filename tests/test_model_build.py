"""The model of official files' settings, on the meta device, and as a compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextblock.blocks import raster_mask
from nextblock.models import NextBlockModel
from test_next_block import AIM, SINGLE, TOKENS, slow_predictor, token_model, unchecked  # noqa: F401 - a fixture
from toy import tiny_images, tiny_model

# -------------------------------------------------------------------------------- masks of official files

OWN_MASKS = {
    "full predictor": ({"predictor_attention": "full"}, True),
    "causal predictor": ({"predictor_attention": "causal"}, True),  # sees the right half of a later block
    "causal predictor of single patches": ({**SINGLE, "predictor_attention": "causal"}, False),
    "larger predictor blocks": ({"predictor_attention": "block_causal", "predictor_block_size": 4}, True),
    "smaller predictor blocks, whole rows": (
        {"block_size": (2, 6), "predictor_attention": "block_causal", "predictor_block_size": (1, 6)},
        False,
    ),
    "the encoder's blocks again": ({"predictor_attention": "block_causal"}, False),
    "full encoder": ({"encoder_attention": "full", "feature_attention": "full"}, True),
}


@pytest.mark.parametrize("case", OWN_MASKS)
def test_masks_of_official_files_are_honoured_and_refused_in_training_if_they_leak(case):
    changes, leaks = OWN_MASKS[case]
    if "larger" in case:
        changes = {**changes, "image_size": (16, 32)}
    model: Any = tiny_model(**changes)
    config, images = model.config, tiny_images(size=model.config.image_size)
    n = config.num_patches
    native = raster_mask(model.patches_of_blocks, torch.arange(config.num_blocks))
    encoder = native if config.encoder_attention == "block_causal" else torch.ones_like(native)
    kind, own = config.predictor_attention, encoder
    if kind == "full":
        own = torch.ones_like(native)
    elif kind == "causal":
        own = torch.ones_like(native).tril()
    elif kind == "block_causal":
        rows, columns = {"larger": (4, 4), "smaller": (1, 6)}.get(case.split()[0], (2, 2))
        places = [(i // config.grid[1] // rows, i % config.grid[1] // columns) for i in range(n)]
        own = torch.tensor([[a >= b for b in places] for a in places])
    hidden = model.encoder.patch_embed(images) + model.encoder.pos_embed
    for layer in model.encoder.blocks:
        hidden = layer(hidden, attn_mask=encoder)
    hidden = slow_predictor(model, model.encoder.norm(hidden), own[None])
    joined = hidden[:, model.patches_of_blocks].transpose(-1, -2).flatten(2)
    expected = model.predictor.block_mlps[0](joined)[:, :-1]
    torch.testing.assert_close(model(images).predictions, expected, atol=1e-4, rtol=1e-4)
    assert model.leaks == leaks
    if leaks:
        with pytest.raises(ValueError, match="tokens see the blocks they are to predict"):
            model.train()(images)
    else:
        model.train()(images)
    with pytest.raises(ValueError, match="know no prefix"):
        model.eval()(images, prefix_lengths=torch.tensor([1, 1]))


def test_the_scale_of_attention_is_the_one_given():
    plain: Any = tiny_model()
    images = tiny_images()
    same, other = tiny_model(qk_scale=8**-0.5), tiny_model(qk_scale=0.5)
    torch.testing.assert_close(same.encode(images).tokens, plain.encode(images).tokens)
    assert list(other.state_dict()) == list(plain.state_dict())
    with torch.no_grad():  # scores s q·k are those of queries that are s sqrt(width) times as long
        for layer in (*plain.encoder.blocks, *plain.predictor.blocks):
            queries = layer.attn.qkv.weight.shape[1]
            for part in (layer.attn.qkv.weight, layer.attn.qkv.bias):
                part[:queries] *= 0.5 * 8**0.5
    torch.testing.assert_close(other(images).predictions, plain(images).predictions, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------- meta device, compiled graphs


@pytest.mark.parametrize("changes", [{}, AIM, {"predictor_attention": "full"}, TOKENS], ids=str)
def test_a_model_built_without_data_is_complete_once_its_weights_are_assigned(changes):
    whole = token_model() if changes is TOKENS else tiny_model(**changes)
    with torch.device("meta"):
        model = NextBlockModel(whole.config)
    model.load_state_dict(whole.state_dict(), assign=True)
    images = tiny_images(size=whole.config.image_size)
    assert torch.equal(model.eval()(images).predictions, whole(images).predictions)
    assert torch.equal(model.encode(images).tokens, whole.encode(images).tokens)


def test_tables_are_made_anew_after_to_empty():
    model, images = tiny_model(), tiny_images()
    expected, weights = model(images).loss, {name: t.clone() for name, t in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.make_buffers()
    model.load_state_dict(weights)
    assert torch.equal(model(images).loss, expected)


@pytest.mark.parametrize(
    ("changes", "lengths", "breaks"), [({"drop_path": 0.2}, None, 0), (AIM, [1, 3], 1), (TOKENS, None, 0)]
)
@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_compiled_step_has_one_graph_but_for_the_rows_of_a_prefix(changes, lengths, breaks):
    model = (token_model() if changes is TOKENS else tiny_model(**changes)).train()
    images, order = tiny_images(size=model.config.image_size), torch.arange(model.config.num_blocks)
    prefix = None if lengths is None else torch.tensor(lengths)
    draws = torch.rand(2, 4) if model.config.drop_path else None
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(images, order, prefix, draws).graph_break_count == breaks
