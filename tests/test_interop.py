"""`load`: every known layout, and what is said of a path or file that holds none."""

from __future__ import annotations

import copy
import os
import pickle
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from nextblock.checkpoint import CheckpointError, save_checkpoint, save_classifier, save_model
from nextblock.interop import aim, create_model, load, load_model, xtra
from nextblock.interop.names import NameTable, ratio_of
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.presets import SIZES
from toy import tiny_images, tiny_model


def same_weights(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -------------------------------------------------------------------------------------------------- own files


def test_a_run_directory_gives_its_latest_model(tmp_path):
    for step, seed in ((2, 1), (10, 2)):
        save_checkpoint(tmp_path / "checkpoints", tiny_model(seed), {"step": step}, step)
    assert same_weights(load(tmp_path), tiny_model(2))
    assert same_weights(load(tmp_path / "checkpoints" / "step_00000002"), tiny_model(1))
    assert same_weights(
        load(str(tmp_path / "checkpoints" / "step_00000002" / "model.safetensors")), tiny_model(1)
    )


def test_a_half_written_checkpoint_is_not_the_latest(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", tiny_model(1), {"step": 2}, 2)
    half = tmp_path / "checkpoints" / ".writing-step_00000009"
    half.mkdir()
    save_model(half / "model.safetensors", tiny_model(2))
    assert same_weights(load(tmp_path), tiny_model(1))


def test_a_probes_head_gives_a_classifier_and_as_a_model_its_encoder(tmp_path):
    head = HeadConfig(kind="linear", num_classes=3, layers=(1,))
    classifier = ImageClassifier(tiny_model(), head, ("a", "b", "c")).eval()
    save_classifier(tmp_path / "head", classifier)
    found = load(tmp_path / "head")
    assert isinstance(found, ImageClassifier)
    assert torch.equal(found(tiny_images()), classifier(tiny_images()))
    assert same_weights(load_model(tmp_path / "head"), tiny_model())


def test_loading_leaves_a_model_for_use(tmp_path):
    save_model(tmp_path / "model.safetensors", tiny_model().train())
    assert not load(tmp_path).training


# ---------------------------------------------------------------------------------------------- official XTRA


@pytest.fixture
def official(golden_dir):
    """The content of an official Lightning file, to be changed and saved."""
    return torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)


@pytest.fixture
def load_content(tmp_path):
    """Save as a pickle and load."""

    def save_and_load(content, **settings):
        torch.save(content, tmp_path / "official.ckpt")
        return load(tmp_path / "official.ckpt", **settings)

    return save_and_load


def test_the_deepspeed_layout_gives_the_same_model(official, load_content):
    deepspeed = {"module": official["state_dict"], "hyper_parameters": official["hyper_parameters"], "dp": 72}
    assert same_weights(load_content(deepspeed, num_heads=3), load_content(official, num_heads=3))


@pytest.mark.parametrize(("arch", "heads"), [("vit_tiny", 3), ("vit_base", 12), ("vit_huge", 16)])
def test_the_architectures_name_tells_the_heads(arch, heads, official, load_content):
    official["hyper_parameters"]["enc_arch"] = arch
    assert load_content(official).config.num_heads == heads


def test_the_argument_comes_before_the_architectures_name(official, load_content):
    official["hyper_parameters"]["enc_arch"] = "vit_base"
    assert load_content(official, num_heads=3).config.num_heads == 3


def test_the_official_width_and_depth_tell_the_heads():
    for name, config in SIZES.items():
        table = (aim if name.startswith("aim-") else xtra).NUM_HEADS_OF_SIZE
        assert table.get((config.embed_dim, config.depth)) == config.num_heads


def test_half_precision_weights_are_cast_to_fp32(official, load_content):
    official["state_dict"] = {name: w.half() for name, w in official["state_dict"].items()}
    model = load_content(official, num_heads=3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_encoder_alone_encodes_and_refuses_to_predict(official, load_content):
    whole = load_content(official, num_heads=3)
    encoder = {n: w for n, w in official["state_dict"].items() if n.startswith("enc.")}
    model = load_content({**official, "state_dict": encoder}, num_heads=3)
    images = tiny_images(size=(64, 64))
    assert torch.equal(model.encode(images).tokens, whole.encode(images).tokens)
    with pytest.raises(ValueError, match="cannot predict"):
        model(images)


def test_an_oblong_image_size_is_taken_from_the_settings(official, load_content):
    official["hyper_parameters"]["enc_img_size"] = [32, 128]
    assert load_content(official, num_heads=3).config.image_size == (32, 128)


def test_an_image_size_that_contradicts_the_positions_is_not_believed(official, load_content):
    official["hyper_parameters"]["enc_img_size"] = [256]
    assert load_content(official, num_heads=3).config.image_size == 64


def test_a_block_size_counts_only_where_the_attention_is_by_blocks(official, load_content):
    settings = official["hyper_parameters"]
    settings.update(enc_is_block_causal=False, enc_is_causal=True, enc_block_size=7)
    weights = official["state_dict"]
    weights = {n: w for n, w in weights.items() if n.startswith("enc.")}
    assert load_content({**official, "state_dict": weights}, num_heads=3).config.block_size == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["hyper_parameters"].update(enc_is_block_causal=False), "enc_is_block_causal nor enc_is"),
        (lambda c: c["hyper_parameters"].pop("predictor_num_heads"), "lacks 'predictor_num_heads'"),
        (lambda c: c["state_dict"].pop("proj.mlp.0.weight"), "lacks 'proj.mlp.0.weight'"),
        (lambda c: c["state_dict"].pop("enc.norm.bias"), "missing: encoder.norm.bias"),
        (
            lambda c: c["state_dict"].update({"enc.cls_token": torch.zeros(1)}),
            "unexpected: encoder.cls_token",
        ),
        (lambda c: c["state_dict"].update({"momentum.x": torch.zeros(1)}), "holds 'momentum.x'"),
        (lambda c: c["state_dict"].update({"enc.norm.bias": torch.zeros(5)}), "(5,) in the file, (48,)"),
    ],
)
def test_a_file_with_something_missing_or_too_much_is_refused_by_name(change, words, official, load_content):
    changed = copy.deepcopy(official)
    change(changed)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_content(changed, num_heads=3)


def test_a_head_without_batch_norm_and_bias_is_built_without(golden_dir, load_content):
    content = torch.load(golden_dir / "linear_probe.ckpt", weights_only=True)
    weights = content["state_dict"]
    for name in [n for n in weights if n.startswith("classifier.") and not n.endswith("weight")]:
        del weights[name]
    classifier = load_content(content, num_heads=3)
    assert (classifier.head_config.batch_norm, classifier.head_config.bias) == (False, False)
    (weight,) = (w for n, w in weights.items() if n.startswith("classifier."))
    images = tiny_images(size=(64, 64))
    torch.testing.assert_close(classifier(images), classifier.features(images) @ weight.T)


def test_a_number_of_heads_that_cannot_be_is_refused(official, load_content):
    with pytest.raises(ValueError, match=r"embed_dim 48 is not divisible by model\.num_heads 5"):
        load_content(official, num_heads=5)


def test_the_pseudo_random_order_and_its_seed_are_read(official, load_content):
    official["hyper_parameters"].update(aim_pseudo_random=True, seed=3)
    config = load_content(official, num_heads=3).config
    assert (config.order, config.order_seed) == ("random", 3)


def test_the_distance_is_read(official, load_content):
    assert load_content(official, num_heads=3).config.loss == "mse"
    official["hyper_parameters"]["aim_l1_loss"] = True
    assert load_content(official, num_heads=3).config.loss == "l1"


# ------------------------------------------------------------------------------------------------ name tables

TABLES = {
    "xtra-model": xtra.ENCODER_NAMES + xtra.PREDICTOR_NAMES,
    "xtra-attentive": xtra.ATTENTIVE_NAMES + xtra.ENCODER_NAMES.under("encoder_model."),
    "xtra-linear": xtra.LINEAR_NAMES + xtra.ENCODER_NAMES.under("encoder_model."),
    "xtra-bare-linear": xtra.BARE_LINEAR_NAMES + xtra.ENCODER_NAMES.under("encoder_model."),
    "aim-model": aim.TRUNK_NAMES + aim.PREDICTOR_NAMES,
    "aim-classifier": aim.TRUNK_NAMES.under("encoder_model.") + aim.CLASSIFIER_NAMES,
}


def examples_of(rule):
    """A rule's two names with its placeholders filled."""
    return [name.format(rest="weight", i=3, d=12) for name in rule]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_one_to_one_in_both_directions(name):
    table, value = TABLES[name], torch.zeros(1)
    for rule in table.rules:
        official, ours = examples_of(rule)
        assert table.to_ours({official: value}, "here") == {ours: value}
        assert table.to_official({ours: value}) == {official: value}
    for rule in table.rules:  # without the rule its names fit no other
        rest = replace(table, rules=tuple(other for other in table.rules if other != rule))
        official, ours = examples_of(rule)
        with pytest.raises(CheckpointError, match="is no part of"):
            rest.to_ours({official: value}, "here")
        with pytest.raises(CheckpointError, match="have no name"):
            rest.to_official({ours: value})


def test_a_name_that_no_rule_fits_is_refused_in_both_directions():
    table = NameTable("XTRA", (("enc.{i}.{rest}", "encoder.{i}.{rest}"),))
    for name in ("enc.a.weight", "enc.1.", "an.enc.1.weight", "enc-1.weight"):
        with pytest.raises(CheckpointError, match=f"here holds {name!r}, which is no part of an XTRA model"):
            table.to_ours({name: torch.zeros(1)}, "here")
    with pytest.raises(CheckpointError, match=r"'enc\.1\.w', for which official XTRA files have no name"):
        table.to_official({"enc.1.w": torch.zeros(1)})


@pytest.mark.parametrize(("hidden", "width"), [(6144, 1408), (2048, 512), (29, 93), (7, 3)])
def test_the_ratio_of_two_widths_gives_the_hidden_one_back(hidden, width):
    assert int(width * ratio_of(hidden, width)) == hidden


def test_some_quotients_alone_would_lose_a_unit():
    lost = [(h, w) for w in range(1, 200) for h in range(1, 200) if int(w * (h / w)) != h]
    assert lost
    assert all(int(w * ratio_of(h, w)) == h for h, w in lost)


# --------------------------------------------------------------------------------------------------- refusals


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_a_directory_without_a_model_is_refused_with_what_was_looked_for_and_found(tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors, check.*found nothing"):
        load(tmp_path)
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"found notes\.txt, photo\.jpg"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"model": {"weight": torch.zeros(2)}, "epoch": 3}, "it holds: model, epoch"),
        ({"state_dict": {"conv1.weight": torch.zeros(2)}}, "it holds: state_dict"),
        ([torch.zeros(2)], "it holds: list"),
    ],
)
def test_weights_in_no_known_format_are_refused_with_what_they_hold(content, held, load_content):
    with pytest.raises(CheckpointError, match=f"in no known format .{held}.*official XTRA"):
        load_content(content)


def test_safetensors_of_another_origin_are_in_no_known_format(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors .*(no known format|not written)"):
        load(tmp_path / "foreign.safetensors")


class Malicious:
    """Its unpickling would make a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_with_the_reason_and_does_not_run_it(tmp_path, load_content):
    trap = tmp_path / "trap"
    with pytest.raises(CheckpointError, match=r"posix\.mkdir\), and reading it could run code") as caught:
        load_content({"state_dict": Malicious(trap), "hyper_parameters": {}})
    assert "state_dict alone" in str(caught.value)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_pickle_does_not_run_code_either(protocol, tmp_path):
    path, trap = tmp_path / "plain.pkl", tmp_path / "trap"
    path.write_bytes(pickle.dumps(Malicious(trap), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"plain\.pkl"):
        load(path)
    assert not trap.exists()
    pickle.loads(path.read_bytes())  # the trap works
    assert trap.exists()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 100, -1000, -1])
def test_a_weight_file_that_is_not_complete_is_refused(length, golden_dir, tmp_path):
    content = (golden_dir / "xtra_k2.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt cannot be read as a weight file.*not complete"):
        load(tmp_path / "cut.ckpt", num_heads=3)


@pytest.mark.parametrize(
    "content", [b"a letter to a friend", b"\x89PNG\r\n\x1a\n" + bytes(99), b"{}", bytes(64)]
)
def test_a_file_of_another_kind_is_refused_and_not_taken_for_a_pickle(content, tmp_path):
    (tmp_path / "thing").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a weight file: it is of another kind"):
        load(tmp_path / "thing")


# ----------------------------------------------------------------------------------------------- create_model


def test_create_model_builds_a_size_with_any_field_changed():
    model = create_model("xtra-tiny", depth=1, block_size=(2, 4))
    assert isinstance(model, NextBlockModel)
    assert (model.config.depth, model.config.block_size, model.config.embed_dim) == (1, (2, 4), 128)
    with pytest.raises(ValueError, match="unknown model setting 'blok_size'; did you mean 'block_size'"):
        create_model("xtra-tiny", blok_size=2)
    with pytest.raises(ValueError, match="unknown preset 'xtra-tny'; did you mean 'xtra-tiny'"):
        create_model("xtra-tny")
