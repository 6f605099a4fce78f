"""Official AIM files: both layouts in and out, what a file cannot tell, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from nextblock.atomic import WriteError
from nextblock.checkpoint import CheckpointError
from nextblock.interop import aim, aim_out
from nextblock.interop.aim import hub_settings, is_aim, is_aim_head, read_aim
from nextblock.interop.aim_out import write_aim
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.models.vit import positions_of
from nextblock.presets import SIZES
from toy import tiny_config, tiny_images, tiny_model

AIM = {
    "block_size": 1,
    "patch_norm": True,
    "positions": "sincos",
    "bias": False,
    "weight_init": "xavier_uniform",
    "prefix": True,
    "predictor": "mlp",
    "projection_dim": None,
    "predictor_extra_norm": True,
    "block_mlp_dim": None,
    "feature_attention": "full",
}
ENCODER = {**AIM, "predictor": None}
IMAGES = tiny_images(size=(56, 56))


@pytest.fixture
def backbone(golden_dir):
    """The content of an official backbone file, to be changed."""
    return torch.load(golden_dir / "aim_nano_backbone.pth", weights_only=True)


@pytest.fixture
def head(golden_dir):
    """The content of the head's file that belongs to it."""
    return torch.load(golden_dir / "aim_nano_head.pth", weights_only=True)


@pytest.fixture
def whole(golden_dir):
    """A model with its prediction head, in the layout of the training code."""
    return load_file(golden_dir / "aim_pretrain_nano_weights.safetensors")


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def read_model(*content, **settings) -> NextBlockModel:
    """`read_aim` of a file that holds an encoder or a whole model."""
    model = read_aim(*content, **settings)
    assert isinstance(model, NextBlockModel)
    return model


def read_classifier(*content, **settings) -> ImageClassifier:
    """`read_aim` of a file, or two, that hold a classifier."""
    classifier = read_aim(*content, **settings)
    assert isinstance(classifier, ImageClassifier)
    return classifier


def tiny_classifier(head=None, **changes):
    settings = {"num_classes": 5, "layers": (0, 1), "num_heads": 3, "bias": False, **(head or {})}
    classifier = ImageClassifier(tiny_model(**{**ENCODER, **changes}), HeadConfig(**settings)).eval()
    if classifier.head_config.batch_norm:
        classifier.head.get_buffer("norm.running_mean").normal_(generator=torch.Generator().manual_seed(1))
    return classifier


# ---------------------------------------------------------------------------------------- inference layout in


def test_a_backbone_alone_encodes_and_refuses_to_predict(backbone):
    model = read_model(backbone, "backbone.pth", num_heads=3)
    assert not model.training
    config = model.config
    assert (config.patch_size, config.embed_dim, config.depth, config.num_heads) == (14, 48, 4, 3)
    assert (config.mlp_ratio, config.norm_eps, config.feature_attention) == (4.0, 1e-6, "full")
    with pytest.raises(ValueError, match="cannot predict"):
        model(IMAGES)


def test_positions_that_are_not_stored_are_computed_for_any_size(backbone):
    default = read_model(backbone, "backbone.pth", num_heads=3)
    assert default.config.image_size == 224
    told = read_model(backbone, "backbone.pth", num_heads=3, image_size=56)
    torch.testing.assert_close(default.encode(IMAGES).tokens, told.encode(IMAGES).tokens)
    oblong = read_model(backbone, "backbone.pth", num_heads=3, image_size=(28, 56))
    assert oblong.config.grid == (2, 4)


def test_a_backbone_and_its_head_give_the_same_classifier_in_two_files_or_one(backbone, head):
    two = read_classifier(backbone, "backbone.pth", head=head, num_heads=3, probe_layers=(1, 2))
    one = read_classifier({**backbone, **head}, "both.safetensors", num_heads=3, probe_layers=[1, 2])
    assert (two.head_config.layers, two.head_config.num_heads, two.head_config.num_classes) == ((1, 2), 3, 10)
    assert (two.head_config.bias, two.head_config.norm_layers) == (False, False)
    assert torch.equal(two(IMAGES), one(IMAGES))
    other_layers = read_classifier(backbone, "backbone.pth", head=head, num_heads=3, probe_layers=(0, 1))
    assert not torch.equal(two(IMAGES), other_layers(IMAGES))


def test_the_hubs_configuration_tells_what_the_file_does_not(backbone, head):
    config = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "num_blocks": 4, "num_heads": 3}
    told = hub_settings({**config, "probe_layers": [1, 2]})
    classifier = read_classifier({**backbone, **head}, "model.safetensors", **told)
    assert classifier.head_config.layers == (1, 2)
    assert classifier.encoder_model.config.image_size == 56
    assert hub_settings({**config, "probe_layers": 3})["probe_layers"] == (1, 2, 3)
    assert hub_settings({**config, "num_blocks": 24})["probe_layers"] == (18, 19, 20, 21, 22, 23)
    assert hub_settings({**config, "num_blocks": 24, "img_size": [28, 56]})["image_size"] == (28, 56)
    assert set(hub_settings({"model_type": "another"}).values()) == {None}


# ----------------------------------------------------------------------------------------- training layout in


def test_a_whole_model_is_read_with_the_settings_of_the_training_code(whole):
    config = read_model(whole, "whole.safetensors", num_heads=3).config
    assert (config.image_size, config.norm_eps, config.prefix) == (56, 1e-5, True)
    assert (config.predictor, config.predictor_extra_norm) == ("mlp", True)
    assert (config.predictor_dim, config.predictor_depth, config.predictor_mlp_ratio) == (64, 2, 4.0)
    assert (config.projection_dim, config.block_mlp_dim) == (None, None)


def test_queries_keys_and_values_are_joined_in_that_order(whole):
    model = read_model(whole, "whole.safetensors", num_heads=3)
    for i, layer in enumerate(model.encoder.blocks):
        for rows, part in zip(layer.get_parameter("attn.qkv.weight").split(48), "qkv", strict=True):
            assert torch.equal(rows, whole[f"trunk.blocks.{i}.attn.{part}_proj.weight"])


def test_the_pixels_of_the_last_map_go_from_row_column_channel_to_channel_row_column(whole):
    ours = read_model(whole, "whole.safetensors", num_heads=3).get_submodule("predictor.block_mlps.0")
    weight, bias = ours.get_parameter("weight"), ours.get_parameter("bias")
    for c, h, w in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 13, 5)]:
        row, official_row = (c * 14 + h) * 14 + w, (h * 14 + w) * 3 + c
        assert torch.equal(weight[row], whole["head.decoder_pred.weight"][official_row])
        assert torch.equal(bias[row], whole["head.decoder_pred.bias"][official_row])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": w, "iteration": 9},
        lambda w: {"state_dict": {f"model.{name}": tensor for name, tensor in w.items()}},
        lambda w: {f"module._orig_mod.{name}": tensor for name, tensor in w.items()},
        lambda w: {n.replace("preprocessor.", "preprocessor.blocks.0."): t for n, t in w.items()},
    ],
    ids=["under a key", "under a key and a prefix", "under two prefixes", "several preprocessors"],
)
def test_weights_are_found_in_their_wrappers(wrap, whole, backbone):
    for weights in (whole, backbone):
        plain = read_aim(weights, "plain", num_heads=3)
        assert is_aim(wrap(weights))
        assert same_tensors(read_aim(wrap(weights), "wrapped", num_heads=3).state_dict(), plain.state_dict())


def test_a_trunk_of_the_training_code_alone_is_an_encoder(whole):
    trunk = {name: tensor for name, tensor in whole.items() if not name.startswith("head.")}
    model = read_model(trunk, "trunk.safetensors", num_heads=3)
    assert (model.config.predictor, model.config.norm_eps, model.config.image_size) == (None, 1e-5, 56)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_to_fp32_and_its_rounded_positions_are_accepted(dtype, whole):
    model = read_aim({n: w.to(dtype) for n, w in whole.items()}, "half.safetensors", num_heads=3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------ which file it is


def test_each_kind_of_file_is_told_by_its_content(backbone, head, whole, golden_dir):
    xtra = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
    for content, trunk, only_head in [
        (backbone, True, False),
        (head, False, True),
        ({**backbone, **head}, True, False),
        (whole, True, False),
        (xtra, False, False),
        ({"weight": torch.zeros(2)}, False, False),
        ({}, False, False),
    ]:
        assert (is_aim(content), is_aim_head(content)) == (trunk, only_head)


# ------------------------------------------------------------------------------------ what a file cannot tell


def test_official_sizes_tell_their_heads_and_best_layers():
    sizes = [SIZES[name] for name in ("aim-600m", "aim-1b", "aim-3b", "aim-7b")]
    assert [aim.NUM_HEADS_OF_SIZE[size.embed_dim, size.depth] for size in sizes] == [12, 16, 24, 32]
    starts = [aim._probe_layers("best", (size.embed_dim, size.depth), "")[0] for size in sizes]
    assert starts == [14, 12, 12, 14]
    for layers in aim.BEST_LAYERS_OF_SIZE.values():
        assert layers == tuple(range(layers[0], layers[0] + 6))


def test_the_table_is_used_where_no_heads_are_given(backbone, monkeypatch):
    monkeypatch.setitem(aim.NUM_HEADS_OF_SIZE, (48, 4), 6)
    assert read_model(backbone, "backbone.pth").config.num_heads == 6
    assert read_model(backbone, "backbone.pth", num_heads=3).config.num_heads == 3


def test_the_last_layers_are_six(tmp_path):
    write_aim(tiny_classifier({"layers": (1, 2, 3, 4, 5, 6)}, depth=7), tmp_path / "out")
    parts = [torch.load(tmp_path / "out" / name, weights_only=True) for name in ("backbone.pth", "head.pth")]
    classifier = read_classifier(
        parts[0], "out", head=parts[1], num_heads=3, probe_layers="last", image_size=16
    )
    assert classifier.head_config.layers == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"probe_layers": (1, 2)}, "how many attention heads its encoder has (48 wide, 4 layers): give it"),
        ({"num_heads": 3}, 'give probe_layers="last", "best", or the layers themselves'),
        ({"num_heads": 3, "probe_layers": "best"}, "says nothing of an encoder 48 wide with 4 layers"),
    ],
)
def test_what_a_file_does_not_tell_is_asked_for(settings, words, backbone, head):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_aim(backbone, "backbone.pth", head=head, **settings)


@pytest.mark.parametrize(("layers", "words"), [("last", "last 6 layers"), ((3, 4), "an encoder with 4")])
def test_layers_that_the_encoder_does_not_have_are_refused(layers, words, backbone, head):
    with pytest.raises(ValueError, match=words):
        read_aim(backbone, "backbone.pth", head=head, num_heads=3, probe_layers=layers)


def test_an_image_size_is_asked_for_where_it_cannot_be_guessed(backbone, whole):
    weight = backbone["preprocessor.patchifier.proj.weight"]
    wider = {**backbone, "preprocessor.patchifier.proj.weight": torch.zeros(*weight.shape[:2], 18, 18)}
    with pytest.raises(
        CheckpointError, match=r"18-px patches, which do not make an image of 224x224 px; give"
    ):
        read_aim(wider, "wider.pth", num_heads=3)
    assert read_model(wider, "wider.pth", num_heads=3, image_size=36).config.grid == (2, 2)
    longer = {**whole, "preprocessor.pos_embed": torch.zeros(1, 18, 48)}
    with pytest.raises(CheckpointError, match=r"18 positions of 14-px patches, .* 56x56 px; give"):
        read_aim(longer, "longer.safetensors", num_heads=3)
    with pytest.raises(CheckpointError, match=r"16 positions of 14-px patches, .* 224x224 px"):
        read_aim(whole, "whole.safetensors", num_heads=3, image_size=224)


# --------------------------------------------------------------------------------------------------- refusals


def lora(weights):
    weights["trunk.blocks.0.attn.qkv.lora_A"] = torch.zeros(16, 48)


def rms_norm(weights):
    for name in [name for name in weights if "norm" in name and name.endswith(".bias")]:
        del weights[name]


def swiglu(weights):
    weights["trunk.blocks.0.mlp.fc3.weight"] = torch.zeros(192, 48)


def oblong_patches(weights):
    weights["preprocessor.patchifier.proj.weight"] = torch.zeros(48, 14, 14, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lora, "holds LoRA weights beside the matrices that they change; merge them"),
        (rms_norm, "is an AIMv2 model (RMSNorm and SwiGLU), and only AIM v1 is read"),
        (swiglu, "is an AIMv2 model"),
        (oblong_patches, "has patches of 14x3 px; they must be square"),
        (
            lambda w: w.pop("preprocessor.patchifier.proj.weight"),
            "lacks 'preprocessor.patchifier.proj.weight'",
        ),
        (lambda w: w.pop("trunk.blocks.2.mlp.fc2.weight"), "missing: encoder.blocks.2.mlp.fc2.weight"),
        (
            lambda w: w.update({"trunk.extra": torch.zeros(1)}),
            "holds 'trunk.extra', which is no part of an AIM",
        ),
        (
            lambda w: w.update({"trunk.blocks.0.attn.qkv.bias": torch.zeros(144)}),
            "unexpected: encoder.blocks.0.attn.qkv.bias",
        ),
    ],
)
def test_a_file_of_another_architecture_or_with_something_missing_is_refused(change, words, backbone):
    change(backbone)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_aim(backbone, "backbone.pth", num_heads=3)


@pytest.mark.parametrize(
    "name", ["encoder.layers.0.rms_norm1.weight", "image_encoder.trunk.blocks.0.norm_1.weight"]
)
def test_aimv2_is_known_in_the_names_of_other_code_too(name):
    content = {name: torch.zeros(8)}
    assert is_aim(content)
    with pytest.raises(CheckpointError, match="transformers has AIMv2"):
        read_aim(content, "aimv2.safetensors")


def test_a_missing_third_of_qkv_is_refused_by_name(whole):
    del whole["trunk.blocks.1.attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 'trunk\.blocks\.1\.attn\.k_proj\.weight'"):
        read_aim(whole, "whole.safetensors", num_heads=3)


@pytest.mark.parametrize("name", ["preprocessor.pos_embed", "head.decoder_pos_embed"])
def test_positions_that_are_not_the_fixed_ones_are_refused(name, whole):
    moved = {**whole, name: whole[name].clone()}
    moved[name][0, 5, 7] += 0.01
    with pytest.raises(CheckpointError, match="are not AIM's sines and cosines on a grid of 4x4 patches"):
        read_aim(moved, "moved.safetensors", num_heads=3)


def test_a_head_that_has_no_backbone_or_does_not_belong_is_refused(backbone, head):
    with pytest.raises(CheckpointError, match="is the head of an AIM classifier alone; load the backbone's"):
        read_aim(head, "head.pth", num_heads=3)
    with pytest.raises(CheckpointError, match=r"is not that of an AIM classifier .it holds: preprocessor"):
        read_aim(backbone, "backbone.pth", head=backbone, num_heads=3)
    with pytest.raises(CheckpointError, match=r"has a head of its own .head\.bn"):
        read_aim({**backbone, **head}, "both.pth", head=head, num_heads=3)
    head["head.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"holds 'head\.extra'"):
        read_aim(backbone, "backbone.pth", head=head, num_heads=3, probe_layers=(1, 2))


# -------------------------------------------------------------------------------------------------------- out


def test_official_files_written_again_have_the_same_names_and_tensors(backbone, head, whole, tmp_path):
    write_aim(read_aim(backbone, "backbone.pth", num_heads=3), tmp_path / "encoder")
    classifier = read_aim(backbone, "backbone.pth", head=head, num_heads=3, probe_layers=(1, 2))
    write_aim(classifier, tmp_path / "classifier")
    write_aim(read_aim(whole, "whole.safetensors", num_heads=3), tmp_path / "whole.safetensors")

    def unpickled(*parts):
        return torch.load(tmp_path.joinpath(*parts), weights_only=True)

    assert [path.name for path in (tmp_path / "encoder").iterdir()] == ["backbone.pth"]
    assert same_tensors(unpickled("encoder", "backbone.pth"), backbone)
    assert same_tensors(unpickled("classifier", "backbone.pth"), backbone)
    assert same_tensors(unpickled("classifier", "head.pth"), head)
    assert same_tensors(load_file(tmp_path / "whole.safetensors"), whole)


@pytest.mark.parametrize("changes", [{}, {"in_chans": 1, "mlp_ratio": 48 / 11, "predictor_mlp_ratio": 3.3}])
def test_a_model_with_its_predictor_is_read_back_the_same(changes, tmp_path):
    model = tiny_model(**{**AIM, "norm_eps": 1e-5, **changes})
    write_aim(model, tmp_path / "deep" / "whole.safetensors")
    again = read_model(load_file(tmp_path / "deep" / "whole.safetensors"), "whole", num_heads=3)
    assert again.config.image_size == (16, 24)  # told by its positions
    assert same_tensors(again.state_dict(), model.state_dict())
    images = tiny_images()[:, : model.config.in_chans]
    assert torch.equal(again(images).predictions, model(images).predictions)
    assert torch.equal(again.encode(images).tokens, model.encode(images).tokens)


def test_an_epsilon_of_ones_own_is_told_at_reading(tmp_path):
    model = tiny_model(**AIM, norm_eps=1e-3)
    write_aim(model, tmp_path / "whole.safetensors")
    weights = load_file(tmp_path / "whole.safetensors")
    again = read_model(weights, "whole", num_heads=3, image_size=(16, 24), norm_eps=1e-3)
    assert torch.equal(again.encode(tiny_images()).tokens, model.encode(tiny_images()).tokens)


def test_a_classifier_is_read_back_with_the_same_answers(tmp_path):
    classifier = tiny_classifier({"layers": (1,)}, predictor="mlp")
    write_aim(classifier, tmp_path / "out")
    parts = [torch.load(tmp_path / "out" / name, weights_only=True) for name in ("backbone.pth", "head.pth")]
    again = read_classifier(
        parts[0], "out", head=parts[1], num_heads=3, probe_layers=(1,), image_size=(16, 24)
    )
    assert again.encoder_model.predictor is None
    assert torch.equal(again(tiny_images()), classifier(tiny_images()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "learned"}, "model.positions is 'learned', there it is always 'sincos'"),
        ({"bias": True}, "model.bias is True"),
        ({"patch_norm": False}, "model.patch_norm is False"),
        ({"block_size": 2}, "model.block_size is (2, 2), there it is always (1, 1)"),
        ({"order": "spiral"}, "model.order is 'spiral'"),
        ({"feature_attention": "causal"}, "model.feature_attention is 'causal'"),
        ({"predictor": None, "norm_eps": 1e-5}, "model.norm_eps is 1e-05, there it is always 1e-06"),
        ({"predictor": "transformer"}, "model.predictor is 'transformer', there it is always 'mlp'"),
        ({"predictor": "linear"}, "model.predictor is 'linear'"),
        ({"prefix": False}, "model.prefix is False"),
        ({"projection_dim": 40}, "model.projection_dim is 40"),
        ({"predictor_extra_norm": False}, "model.predictor_extra_norm is False"),
        ({"block_mlp_dim": 32}, "model.block_mlp_dim is 32"),
        ({"num_predicted_blocks": 2}, "model.num_predicted_blocks is 2"),
        ({"norm_pixels": False}, "model.norm_pixels is False"),
        ({"loss": "l1"}, "model.loss is 'l1'"),
        ({"tokenizer": "kmeans", "vocab_size": 5}, "model.tokenizer is 'kmeans'"),
    ],
)
def test_a_setting_that_aim_does_not_have_is_refused_by_name(changes, words, tmp_path):
    with pytest.raises(CheckpointError, match="^AIM files cannot hold this model: .*" + re.escape(words)):
        write_aim(tiny_model(**{**AIM, **changes}), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"kind": "linear"}, "the head's kind is 'linear', there it is always 'attentive'"),
        ({"num_heads": 4}, "the head's num_heads is 4, there it is always 3"),
        ({"num_queries": 2}, "the head's num_queries is 2"),
        ({"bias": True}, "the head's bias is True"),
        ({"batch_norm": False}, "the head's batch_norm is False"),
        ({"layer_pool": "concat"}, "the head's layer_pool is 'concat'"),
        ({"norm_layers": True}, "the head's norm_layers is True"),
        ({"attention": "causal"}, "the head's attention is 'causal'"),
    ],
)
def test_a_head_that_aim_does_not_have_is_refused_by_name(head, words, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        write_aim(tiny_classifier(head), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_timm_is_advised_only_for_what_it_can_hold_whole(tmp_path):
    for settings, advised in ((ENCODER, True), (AIM, False)):
        with pytest.raises(CheckpointError) as caught:
            write_aim(tiny_model(**{**settings, "bias": True}), tmp_path / "out")
        assert ("convert it to timm" in str(caught.value)) == advised


def test_what_stands_in_the_place_of_the_files_is_left_alone(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "thesis.txt").touch()
    (tmp_path / "file").write_text("a letter")
    encoder, whole = tiny_model(**ENCODER), tiny_model(**AIM)
    for place in ("runs", "file"):
        with pytest.raises(CheckpointError, match=f"{place} is in the way: backbone.pth go"):
            write_aim(encoder, tmp_path / place)
    with pytest.raises(CheckpointError, match="runs is a directory; name the file"):
        write_aim(whole, tmp_path / "runs")
    assert (tmp_path / "runs" / "thesis.txt").exists()
    assert (tmp_path / "file").read_text() == "a letter"


def test_earlier_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_aim(tiny_classifier(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    save, saved = torch.save, []

    def save_once(content, target):
        if saved:
            raise OSError("no space left on device")
        saved.append(target)
        save(content, target)

    monkeypatch.setattr(aim_out.torch, "save", save_once)
    with pytest.raises(WriteError, match="no space left on device"):
        write_aim(tiny_classifier({"num_classes": 7}), tmp_path / "out")
    assert len(saved) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    monkeypatch.undo()
    write_aim(tiny_classifier({"num_classes": 7}), tmp_path / "out")
    head = torch.load(tmp_path / "out" / "head.pth", weights_only=True)
    assert len(head["head.linear.weight"]) == 7


def test_moved_positions_are_refused_as_their_place_in_the_file_is_taken_by_the_fixed_ones(tmp_path):
    for settings in (AIM, ENCODER):
        model = tiny_model(**settings)
        positions_of(model.encoder).data[0, 3, 1] += 0.01
        with pytest.raises(CheckpointError, match="positions of this model are not AIM's sines and cosines"):
            write_aim(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_tiny_settings_are_those_of_the_aim_presets():
    preset = SIZES["aim-600m"]
    assert {name: getattr(preset, name) for name in AIM} == AIM
    assert tiny_config(**AIM).num_blocks == 24
