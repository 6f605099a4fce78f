"""Probes: what they learn, that they are repeatable and independent, what they write, what they refuse."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nextblock
from nextblock.checkpoint import read_model
from nextblock.cli import main
from nextblock.data import TooManyBadImages, eval_batches, normalize
from nextblock.evaluate import features as features_module
from nextblock.evaluate.features import FeatureBatch
from nextblock.evaluate.probe.run import probe, probe_model
from nextblock.evaluate.probe.train_heads import Student, Trained, measure
from nextblock.evaluate.sources import hold_out
from nextblock.interop import load, load_model
from nextblock.models.heads import ImageClassifier, LinearHead
from probing import QUICK, known_config, run, weights
from toy import CONFIG, DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture


def accuracies(found):
    return [(row.encoder, row.head, row.top1, row.top5) for row in found.result.rows]


def test_both_heads_tell_colours_apart():
    result = run().result
    assert [row.head for row in result.rows] == ["attentive", "linear"]
    assert min(row.top1 for row in result.rows) > 0.95
    assert {row.images for row in result.rows} == {48}
    assert (result.train_images, result.num_classes) == (96, 4)


def test_shuffled_labels_leave_both_heads_at_chance():
    result = run(train=ToySource(200, shuffled=True), val=ToySource(100, seed=1)).result
    assert max(row.top1 for row in result.rows) < 0.45


def test_with_fewer_than_five_classes_the_right_one_is_always_among_the_likeliest():
    assert {row.top5 for row in run(replace(QUICK, epochs=1)).result.rows} == {1.0}


def test_the_same_seed_gives_the_same_heads_and_another_seed_others():
    first, again, other = run(), run(), run(replace(QUICK, seed=1))
    assert accuracies(first) == accuracies(again)
    for head in ("attentive", "linear"):
        assert torch.equal(weights(first, head), weights(again, head))
        assert not torch.equal(weights(first, head), weights(other, head))


@pytest.mark.parametrize("head", ["attentive", "linear"])
def test_heads_trained_together_are_the_heads_trained_alone(head):
    together, alone = run(), run(replace(QUICK, heads=(head,)))
    assert torch.equal(weights(together, head), weights(alone, head))


def test_features_that_do_not_fit_in_memory_are_computed_anew_with_the_same_result(caplog):
    caplog.set_level(logging.INFO)
    train = ToySource(96)
    cached, streamed = run(), run(replace(QUICK, cache_gb=0), train=train)
    assert "computed anew in every epoch" in caplog.text
    assert train.reads > 96 * QUICK.epochs
    for head in ("attentive", "linear"):
        torch.testing.assert_close(weights(cached, head), weights(streamed, head), atol=1e-4, rtol=1e-4)


def test_crops_are_new_in_every_epoch_and_repeatable():
    cropped = replace(QUICK, augment="crop", epochs=4)
    first, again, plain = run(cropped), run(cropped), run(replace(cropped, augment="none"))
    assert torch.equal(weights(first, "linear"), weights(again, "linear"))
    assert not torch.allclose(weights(first, "linear"), weights(plain, "linear"), atol=1e-3)


def test_the_encoder_and_the_global_generator_are_left_alone():
    model = toy_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    config = replace(QUICK, epochs=1, baselines=True)
    probe_model(model, config, ToySource(32), {"val": ToySource(16, seed=1)}, DATA)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_baselines_are_an_untrained_encoder_and_raw_pixels():
    found = run(replace(QUICK, baselines=True))
    assert [(row.encoder, row.head) for row in found.result.rows] == [
        ("trained", "attentive"),
        ("trained", "linear"),
        ("untrained", "attentive"),
        ("untrained", "linear"),
        ("raw pixels", "linear"),
    ]
    assert found.result.row("raw pixels", "linear").layers == ()
    assert found.result.row("untrained", "linear").layers == (1,)
    assert found.result.row("untrained", "linear").top1 > 0.9
    assert found.classifiers.keys() == {"attentive", "linear"}


def test_layers_beyond_the_depth_are_capped_and_this_is_said(caplog):
    caplog.set_level(logging.INFO)
    result = run(replace(QUICK, epochs=1)).result
    assert result.row("trained", "attentive").layers == (0, 1)
    assert result.row("trained", "linear").layers == (1,)
    assert "the encoder has 2 layers: all of them are taken, not 6" in caplog.text


def test_unreadable_images_are_left_out_and_counted():
    for config in (QUICK, replace(QUICK, cache_gb=0), replace(QUICK, augment="crop", heads=("linear",))):
        found = run(config, train=ToySource(96, bad={0, 5}), val=ToySource(48, seed=1, bad={7}))
        assert found.result.bad_images == {"train": 2, "val": 1}
        assert found.result.train_images == 94
        assert {row.images for row in found.result.rows} == {47}
        assert found.result.row("trained", "linear").top1 > 0.9


def test_more_unreadable_images_than_allowed_stop_the_probe():
    with pytest.raises(TooManyBadImages, match="3 of the 48 images of toy-1"):
        run(val=ToySource(48, seed=1, bad={1, 2, 3}), data=replace(DATA, max_bad_fraction=0.05))


def test_a_source_smaller_than_a_batch_is_one_batch():
    assert run(replace(QUICK, batch_size=1000, epochs=60)).result.row("trained", "attentive").top1 > 0.9


def test_accuracy_is_counted_one_image_at_a_time():
    source = ToySource(40)
    torch.manual_seed(0)
    head = LinearHead(8, 4).eval()
    features = torch.randn(40, 8)
    parts = [FeatureBatch((features[i : i + 9],), torch.arange(40)[i : i + 9], ()) for i in range(0, 40, 9)]
    found = measure([Trained(head, 0)], parts, source).measures[0]
    assert found is not None
    top1 = top5 = 0
    for feature, label in zip(features, source.labels, strict=True):
        ranking = head(feature[None])[0].argsort(descending=True).tolist()
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    assert (found.top1, found.top5, found.images) == (top1 / 40, top5 / 40, 40)


@pytest.mark.parametrize(("warmup_epochs", "first_lr"), [(0.0, 1e-2), (1.0, 1e-3), (None, 1e-3)])
def test_without_warm_up_heads_start_at_the_rate_that_was_asked_for(monkeypatch, warmup_epochs, first_lr):
    rates = []
    learn = Student.learn
    monkeypatch.setattr(
        Student,
        "learn",
        lambda self, *args: (learn(self, *args), rates.append(self.optimizer.param_groups[0]["lr"])),
    )
    run(replace(QUICK, warmup_epochs=warmup_epochs, heads=("linear",), epochs=20))
    assert rates[0] == pytest.approx(first_lr)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 2e-4
    assert len(rates) == 20 * 6


def test_a_head_that_diverges_is_said_to():
    with pytest.raises(ValueError, match=r"LinearHead diverged at learning rate 1e\+38"):
        run(replace(QUICK, lr=(1e38,), heads=("linear",), warmup_epochs=0))


def test_the_held_out_tenth_is_stratified_disjoint_and_drawn_by_the_seed():
    labels = np.random.Generator(np.random.PCG64(0)).integers(0, 5, 400)
    kept, held = hold_out(labels, 0)
    assert sorted([*kept, *held]) == list(range(400))
    for label in range(5):
        members = int((labels == label).sum())
        assert int((labels[held] == label).sum()) == round(members / 10)
    assert np.array_equal(held, hold_out(labels, 0)[1])
    assert not np.array_equal(held, hold_out(labels, 1)[1])


def test_a_class_of_one_image_keeps_it_and_one_of_two_gives_one():
    labels = np.array([0, 1, 1])
    kept, held = hold_out(labels, 0)
    assert 0 in kept
    assert len(held) == 1
    assert labels[held[0]] == 1


# ----------------------------------------------------------------------------------------------- with files


@pytest.fixture
def known(monkeypatch, tmp_path):
    return known_config(monkeypatch, tmp_path)


def test_results_and_classifiers_are_written(known, tmp_path):
    result = probe(replace(known, epochs=8, baselines=True))
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [row["top1"] for row in written["rows"]] == [row.top1 for row in result.rows]
    assert written["settings"]["train"] == "toy-0"
    val = written["sources"]["val"]
    assert (val["spec"], val["fingerprint"], val["images"]) == ("toy-1", "toy-1-48", 48)
    table = (tmp_path / "out" / "probe.md").read_text()
    assert f"| trained | linear | val | 48 | {100 * result.row('trained', 'linear').top1:.2f} |" in table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "attentive",
        "linear",
        "probe.csv",
        "probe.json",
        "probe.md",
    ]


@pytest.mark.parametrize("head", ["attentive", "linear"])
def test_a_written_classifier_has_the_accuracy_that_was_measured(known, tmp_path, head):
    result = probe(replace(known, epochs=8))
    classifier = read_model(tmp_path / "out" / head / "model.safetensors").eval()
    source = ToySource(48, seed=1)
    assert classifier.class_names == source.class_names
    data = replace(DATA, val_resize_px=18)  # 16 * 8/7: the toy model comes from no run that says otherwise
    (batch,) = eval_batches(source, data, 16, 48)
    with torch.no_grad():
        predicted = classifier(normalize(batch.images, data.mean, data.std)).argmax(-1).numpy()
    assert (predicted == source.labels).mean() == result.row("trained", head).top1


def test_without_val_and_test_a_tenth_of_train_is_held_out_and_this_is_said(known, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    result = probe(replace(known, val=None))
    assert {(row.split, row.images) for row in result.rows} == {("held-out", 8)}
    assert result.train_images == 88
    assert "neither val nor test was given: 8 of 96 images of toy-0 are held out" in caplog.text


def test_val_and_test_are_both_measured(known):
    result = probe(replace(known, test="toy-2"))
    assert [(row.head, row.split, row.images) for row in result.rows] == [
        ("attentive", "val", 48),
        ("linear", "val", 48),
        ("attentive", "test", 40),
        ("linear", "test", 40),
    ]


def test_the_same_probe_may_be_run_again_and_another_needs_overwrite(known, tmp_path):
    first = probe(known)
    again = probe(replace(known, workers=0, encode_batch_size=7))
    assert [row.top1 for row in again.rows] == [row.top1 for row in first.rows]
    other = replace(known, lr=(2e-2,))
    with pytest.raises(
        ValueError, match=r"holds another result \(settings.lr: \[0.01\] there, \[0.02\] here\).*--overwrite"
    ):
        probe(other)
    with pytest.raises(ValueError, match=r"another result .*weights"):
        probe(replace(known, model="RUN1"))
    probe(replace(other, overwrite=True))
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["settings"]["lr"] == [2e-2]


def test_a_directory_of_other_files_is_refused(known, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\); give another --out"):
        probe(known)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("path", ["features/mine.npy", "figures/mine.png", "linear/mine.pt"])
def test_a_directory_that_has_the_name_of_one_of_ours_is_left_alone(known, tmp_path, path, overwrite):
    mine = tmp_path / "out" / path
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=rf"holds other files \({mine.parent.name}\); give another --out"):
        probe(replace(known, overwrite=overwrite))
    assert mine.read_text() == "mine"


def test_a_cache_in_out_is_kept(known, tmp_path):
    config = replace(known, epochs=1, cache=str(tmp_path / "out" / "features"))
    probe(config)
    assert list((tmp_path / "out" / "features").glob("*/features.npy"))
    probe(replace(config, overwrite=True))


def test_a_probe_that_was_cut_off_while_writing_may_be_run_again(known, tmp_path, monkeypatch):
    def cut_off(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("nextblock.evaluate.probe.run.write_text", cut_off)
        probe(known)
    assert (tmp_path / "out" / "linear").is_dir()
    probe(known)
    assert (tmp_path / "out" / "linear" / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{}, {"augment": "crop"}, {"cache_gb": 0.0}])
def test_features_that_are_no_numbers_are_not_blamed_on_the_learning_rate(changes):
    blind = toy_model()
    with torch.no_grad():
        blind.encoder.patch_embed.proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the features of \d+ of \d+ images are no numbers, .*the weights"):
        probe_model(blind, replace(QUICK, **changes), ToySource(32), {"val": ToySource(16, seed=1)}, DATA)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ()}, "heads are .*name at least one"),
        ({"heads": ("linear", "linear")}, "each once"),
        ({"batch_size": 1}, "at least 2 images"),
        ({"epochs": 0}, "epochs is 0"),
        ({"layers": ("last0",)}, "layers is 'last0'; use last, last6"),
        ({"lr": (1e-6,)}, "end_lr lie from 0 to lr"),
        ({"lr": (float("nan"),)}, "end_lr lie from 0 to lr"),
        ({"warmup_epochs": 12.0}, "warmup_epochs is 12.0 and epochs 12"),
        ({"clip_grad": 0.0}, "clip_grad is 0.0"),
        ({"cache_gb": -1.0}, "cache_gb is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **settings)


def test_sources_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="do not have the same classes: only toy-0 has c, d"):
        run(val=ToySource(8, seed=1, class_names=("a", "b")))


def test_attention_heads_that_do_not_divide_the_width_are_refused():
    message = (
        f"{CONFIG.embed_dim} channels wide cannot have 5 attention heads; "
        r"set attentive_heads \(--attentive_heads\) to a divisor, such as 4"
    )
    with pytest.raises(ValueError, match=message):
        run(replace(QUICK, attentive_heads=5))


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run(replace(QUICK, precision="fp16"))


def test_an_official_file_is_probed(known, tmp_path, golden_dir, monkeypatch):
    monkeypatch.setattr(features_module, "open_encoder", load_model)
    config = replace(known, model=str(golden_dir / "xtra_k2.ckpt"), num_heads=3, epochs=1)
    result = probe(config)
    assert [row.layers for row in result.rows] == [(0, 1, 2, 3), (3,)]
    assert isinstance(load(tmp_path / "out" / "attentive"), ImageClassifier)


# ----------------------------------------------------------------------- from Python and the command line


def test_python_takes_paths_and_lists(known, tmp_path):
    given = {**vars(known), "model": Path("RUN"), "out": tmp_path / "out", "heads": ["linear"]}
    result = nextblock.probe(**{**given, "betas": [0.9, 0.95]})
    assert [row.head for row in result.rows] == ["linear"]
    assert (tmp_path / "out" / "probe.json").is_file()


def test_python_refuses_unknown_and_missing_names():
    with pytest.raises(ValueError, match=r"unknown setting 'epoch'; did you mean 'epochs'\?"):
        nextblock.probe(model="RUN", train="toy-0", out="OUT", epoch=3)
    with pytest.raises(ValueError, match=r"^train and out must be given$"):
        nextblock.probe(model="RUN")


def test_overwrite_is_a_bare_flag(known, tmp_path, capsys):
    words = ["--model", "RUN", "--train", "toy-0", "--val", "toy-1", "--out", str(tmp_path / "out")]
    words += ["--epochs", "1", "--batch_size", "16", "--heads", "[linear]", "--baselines", "false"]
    words += ["--device", "cpu", "--workers", "0", "--lr", "0.01"]
    assert main(["probe", *words]) == 0
    assert main(["probe", *words[:-1], "0.1"]) == 2
    assert "give another --out, or --overwrite" in capsys.readouterr().err
    assert main(["probe", *words[:-1], "0.1", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["settings"]["lr"] == [0.1]
