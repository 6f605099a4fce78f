"""Starting from other weights: what fits is taken over, the rest is named, what would mislead is said."""

import logging

import pytest
import torch

from nextblock.checkpoint import CheckpointError, save_model
from nextblock.interop import create_model, initialize
from nextblock.interop.init_from import in_groups, initialize_from
from nextblock.models.vit import resample_positions, sincos_positions
from nextblock.targets import KMeansTokenizer
from test_checkpoint import STATE, same_weights
from tiny_runs import save_checkpoint
from toy import tiny_images, tiny_model

PLAIN = {"patch_norm": True, "bias": False}
AIM = {**PLAIN, "positions": "sincos", "predictor": "mlp", "predictor_extra_norm": True}


def started(other, **changes):
    """A model of some settings changed that started from another, and the report."""
    model = tiny_model(1, **changes)
    return model, initialize_from(model, other, "RUN")


def test_a_model_of_the_same_sizes_takes_everything_over_and_create_model_too(tmp_path):
    tokens = {"target": "tokens", "vocab_size": 5}
    other = tiny_model(2, **tokens)
    assert other.targets is not None
    other.targets.fit(torch.randn(60, 48, generator=torch.Generator().manual_seed(1)), seed=0)
    model, report = started(other, **tokens)
    assert same_weights(model, other)
    assert isinstance(model.tokenizer, KMeansTokenizer)
    assert model.tokenizer.is_fitted
    nothing = {"resampled": (), "fresh": (), "unused": (), "differing": {}, "trained_otherwise": {}}
    assert vars(report) == {"origin": "RUN", "loaded": tuple(model.state_dict()), **nothing}

    save_model(tmp_path / "model.safetensors", tiny_model(2))
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "image_size": 16}
    name, created = "blocks.1.mlp.fc2.weight", create_model("xtra-tiny", **sizes, init=str(tmp_path))
    assert torch.equal(created.encoder.state_dict()[name], tiny_model(2).encoder.state_dict()[name])


def test_for_another_image_size_only_positions_are_resampled():
    other = tiny_model(2)
    model, report = started(other, image_size=(24, 16))
    assert report.resampled == ("encoder.pos_embed", "predictor.pos_embed")
    assert report.fresh == report.unused == ()
    for name, tensor in model.state_dict().items():
        theirs, grid = other.state_dict()[name], model.config.grid
        expected = resample_positions(theirs, (4, 6), grid) if name in report.resampled else theirs
        assert torch.equal(tensor, expected)


def test_another_predictor_stays_fresh_and_is_listed():
    changes = {"predictor_dim": 32, "predictor_depth": 1}
    before = tiny_model(1, **changes).state_dict()
    model, report = started(tiny_model(2), **changes)
    assert {"predictor.pos_embed", "predictor.blocks.0.attn.qkv.weight"} <= set(report.fresh)
    assert "predictor.blocks.1.norm1.weight" in report.unused
    assert {name for name in before if name.startswith("encoder.")} <= set(report.loaded)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in report.fresh or before[name].std() == 0), name


@pytest.mark.parametrize("other", [{"predictor": "mlp"}, {"predictor_heads": 4}])
def test_predictor_layers_of_another_kind_or_of_other_heads_stay_fresh(other):
    _, report = started(tiny_model(2, **other))
    assert "predictor.blocks.0.mlp.fc1.weight" in set(report.fresh) & set(report.unused)
    assert "predictor.projection.0.weight" in report.loaded


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        ({}, {"embed_dim": 48, "depth": 3}, "RUN fits: it is 48 wide with 3 layers, this model 24 wide with"),
        ({"num_heads": 2}, {}, r"has 3 attention heads, this model 2.*set model\.num_heads 3"),
    ],
)
def test_weights_that_do_not_fit_or_would_fit_and_mean_something_else_are_refused(here, there, words):
    with pytest.raises(CheckpointError, match=words):
        started(tiny_model(2, **there), **here)


def test_starting_from_a_run_says_what_became_of_every_weight(tmp_path, caplog):
    save_checkpoint(tmp_path / "checkpoints", tiny_model(2), STATE, 1)
    with caplog.at_level(logging.INFO):
        report = initialize(tiny_model(1, image_size=(32, 32), predictor_depth=1), tmp_path)
    assert f"{len(report.loaded)} tensors loaded" in caplog.text
    assert "resampled: encoder.pos_embed, predictor.pos_embed" in caplog.text
    assert "unused, not here: predictor.blocks.1 (12)" in caplog.text
    names = [f"encoder.blocks.{i}.norm1.{what}" for i in (0, 1, 2) for what in ("weight", "bias")]
    assert in_groups([*names, "encoder.norm.bias"]) == {"encoder.blocks.0-2": 6, "encoder.norm": 1}


def test_heads_that_a_file_does_not_tell_are_taken_to_be_the_models_with_a_warning(golden_dir, caplog):
    model = tiny_model(1, image_size=56, patch_size=14, embed_dim=48, depth=4, block_size=1, **AIM)
    initialize(model, golden_dir / "aim_nano_backbone.pth")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "aim_nano_backbone.pth does not record its attention heads; assuming 3" in warning
    assert "set model.num_heads" in warning


def test_the_task_that_the_weights_were_trained_for_is_told_where_it_is_another(tmp_path, caplog):
    save_model(tmp_path / "model.safetensors", tiny_model(2))
    others = {"block_size": (4, 2), "order": ("spiral", "raster"), "prefix": (True, False)}
    here = {name: ours for name, (ours, _) in others.items()}
    with caplog.at_level(logging.INFO):
        report = initialize(tiny_model(1, image_size=32, **here), tmp_path)
    assert report.differing == {}
    assert report.trained_otherwise == {f"model.{name}": values for name, values in others.items()}
    assert "trained under other settings: model.block_size 2 there, 4 here; model.order raster" in caplog.text
    assert "WARNING" not in caplog.text


def test_settings_by_which_the_same_weights_compute_something_else_are_told(tmp_path, caplog):
    save_model(tmp_path / "model.safetensors", tiny_model(2, norm_eps=1e-5, **AIM))
    report = initialize(tiny_model(1), tmp_path)
    assert report.differing == {"model.norm_eps": (1e-6, 1e-5), "model.patch_norm": (False, True)}
    assert "set model.norm_eps 1e-05 (here 1e-06)" in caplog.text
    assert "set model.patch_norm true (here false)" in caplog.text


def test_parts_of_the_encoder_that_one_of_them_lacks_are_told():
    parts = {"class_token": True, "qk_norm": "plain", "positions": "rope", "layer_scale": 0.1}
    plain = {"class_token": False, "qk_norm": None, "positions": "learned", "layer_scale": None}
    _, report = started(tiny_model(2, **parts))
    assert report.differing == {f"model.{name}": (plain[name], parts[name]) for name in parts}
    assert {"encoder.cls_token", "encoder.blocks.1.gamma_2"} <= set(report.unused)
    model, report = started(tiny_model(2, **parts), **parts | {"layer_scale": 0.5})
    assert report.differing == {}
    assert same_weights(model, tiny_model(2, **parts))


@pytest.mark.parametrize(("changes", "resampled"), [(AIM, []), (PLAIN, ["encoder.pos_embed"])])
def test_fixed_and_learned_positions_begin_as_the_fixed_ones_of_this_models_grid(changes, resampled):
    model, report = started(tiny_model(2, **AIM), image_size=(32, 32), **changes)
    assert report.differing == {}
    assert [name for name in report.resampled if name.startswith("encoder.")] == resampled
    assert changes != AIM or report.resampled == report.fresh == report.unused == ()
    assert torch.equal(model.get_parameter("encoder.pos_embed"), sincos_positions((8, 8), 24))


def test_an_encoder_without_biases_is_the_same_function_with_fresh_ones():
    other = tiny_model(2, **AIM)
    model, report = started(other, patch_norm=True)
    assert report.differing == {}
    assert "encoder.blocks.0.attn.qkv.bias" in report.fresh
    torch.testing.assert_close(model.encode(tiny_images()).tokens, other.encode(tiny_images()).tokens)
