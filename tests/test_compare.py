"""`nextblock eval`: methods and models in one table, each image encoded once; classifiers as they are."""

import json
import signal

import pytest
import torch

from evaluating import toy_verb, written  # noqa: F401 - a fixture
from nextblock.checkpoint import save_classifier, save_model
from nextblock.cli import main
from nextblock.errors import UsageError
from nextblock.evaluate import compare
from nextblock.evaluate.evaluation import Stopped
from nextblock.evaluate.results import SATURATED
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from ranks import run_ranks
from toy import DATA, ToySource, toy_model

pytestmark = pytest.mark.usefixtures("coarse_pictures")
QUICK = {"train": "toy-0", "test": "toy-1", "shots": "1", "epochs": 1}


@pytest.fixture
def other_model(tmp_path):
    save_model(tmp_path / "other.safetensors", toy_model(3), data=DATA)
    return str(tmp_path / "other.safetensors")


def test_all_methods_stand_in_one_table_as_each_gives_alone(run, tmp_path):
    out = tmp_path / "eval"
    found = run("compare", **QUICK, out=out)
    methods = ["kNN, k 20", "1 label a class", "linear", "attentive", "ep"]
    assert list(dict.fromkeys(row["method"] for row in found.rows)) == methods
    alone = run("knn", train="toy-0", test="toy-1", k=(20,))
    for encoder in ("model", "untrained", "pixels 16x16", "colour histogram"):
        mine, its = found.row(encoder=encoder, method="kNN, k 20"), alone.row(encoder=encoder)
        assert all(mine[key] == its[key] for key in ("top1", "top1_se", "balanced"))
    probe = run("probe", train="toy-0", test="toy-1", epochs=1, heads=("ep",), baselines=False)
    assert found.row(encoder="model", method="ep")["top1"] == probe.row(encoder="model", head="ep")["top1"]
    assert written(out / "eval.json")["rows"] == json.loads(json.dumps(found.rows))
    text = (out / "eval.md").read_text()
    assert text.startswith(f"# eval of {tmp_path}/model.safetensors\n")
    assert text.count("| linear |") == 4
    assert "top-5" not in text  # four classes
    # The same command reads what is there.
    assert run("compare", **QUICK, out=out).rows == found.rows
    assert not list(out.rglob("features.npy"))


def test_each_image_is_encoded_once_for_each_encoder(run, monkeypatch):
    images, encode = [], NextBlockModel.encode

    def counting(self, batch, *args, **options):
        images.append(len(batch))
        return encode(self, batch, *args, **options)

    monkeypatch.setattr(NextBlockModel, "encode", counting)
    # Without ep, which encodes a few images more to draw its queries' attention.
    run("compare", **QUICK, methods=("knn", "fewshot", "linear", "attentive"), encode_batch_size=16)
    assert sum(number for number in images if number > 1) == 2 * (48 + 32)  # the model and untrained


def test_models_are_compared_on_the_same_images(run, other_model):
    run.sources["toy-0"] = ToySource(48, shuffled=True)  # lest all are at 100 %
    models = (run.usual["model"], other_model)
    found = run("compare", **QUICK, model=models, methods=("knn", "linear"), baselines=False)
    assert len(found.rows) == 4
    first, second = (found.row(model=model, method="linear") for model in models)
    assert "to_first" not in first
    assert second["to_first"] == pytest.approx(second["top1"] - first["top1"]) != 0
    assert second["to_first_se"] > 0


def test_baselines_that_are_not_beaten_are_named_once(run):
    assert SATURATED in run("compare", **QUICK, methods=("knn",)).notes
    run.sources |= {"toy-0": ToySource(48, shuffled=True), "toy-1": ToySource(40, seed=1)}
    found = run("compare", **QUICK, methods=("knn", "fewshot"))
    (note,) = [note for note in found.notes if note.startswith("The model is not clearly better than")]
    assert "pixels 16x16 (kNN, k 20 " in note
    assert found.notes[1] == "48 train images, 40 test images."
    assert note.endswith("start from another model's weights (pretrain --model.init).")


def test_few_shot_is_left_out_and_noted_if_a_class_has_too_few_images(run):
    settings = {**QUICK, "shots": "13", "baselines": False}
    found = run("compare", **settings, methods=("knn", "fewshot"))
    assert [row["method"] for row in found.rows] == ["kNN, k 20"]
    assert found.notes[-1].endswith("draw at most 12 per class (--shots 12)")
    with pytest.raises(UsageError, match="Labels 13 not measured"):
        run("compare", **settings, methods=("fewshot",))


def test_a_stop_without_a_directory_says_that_nothing_was_saved(run, monkeypatch):
    def stop(**_):
        raise Stopped(signal.SIGINT, "stopped by SIGINT; the same command resumes")

    monkeypatch.setattr(compare, "knn", stop)
    with pytest.raises(Stopped, match="stopped by SIGINT; nothing was saved; give --out"):
        run("compare", **QUICK, methods=("knn",), baselines=False)


def test_another_command_with_the_same_directory_is_refused_before_anything_is_measured(
    run, tmp_path, other_model
):
    run.sources["toy-2"] = ToySource(24, seed=2)
    usual = {**QUICK, "methods": ("knn",), "baselines": False, "out": tmp_path / "eval"}
    first = run("compare", **usual)
    for changes in ({"methods": ("linear",)}, {"model": (other_model,)}, {"test": "toy-2"}):
        with pytest.raises(UsageError, match="holds another result"):
            run("compare", **usual | changes)
    assert run("compare", **usual).rows == first.rows
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["rows"] == list(first.rows)


def classifier(path, names):
    torch.manual_seed(0)
    head = HeadConfig(kind="linear", num_classes=4, layers=(1,))
    save_classifier(path, ImageClassifier(toy_model(), head, names), data=DATA)
    return str(path)


def test_a_classifier_is_measured_as_it_is_by_names_or_by_numbers(run, tmp_path):
    def top1(names, **settings):
        (row,) = run("compare", model=(classifier(tmp_path / "c", names),), test="toy-1", **settings).rows
        assert (row["method"], row["images"]) == ("its own classifier", 32)
        assert 0 <= row["top1"] <= row["top5"] == 1
        return row["top1"]

    (tmp_path / "classes.txt").write_text("d\nc\nb\na\n")
    own, turned = top1(("a", "b", "c", "d")), top1(("d", "c", "b", "a"))
    assert own != turned
    assert top1(None) == own  # by number
    assert top1(None, classes=tmp_path / "classes.txt") == turned


def test_the_score_of_a_classifier_is_read_again_and_another_one_is_refused(run, tmp_path, monkeypatch):
    usual = {"model": (classifier(tmp_path / "c", None),), "test": "toy-1", "out": tmp_path / "eval"}
    first = run("compare", **usual)
    monkeypatch.setattr(compare, "measure_logits", None)  # nothing is measured again
    assert run("compare", **usual).rows == first.rows
    (tmp_path / "classes.txt").write_text("b\na\nc\nd\n")
    for changes in ({"test": "toy-0"}, {"classes": tmp_path / "classes.txt"}):
        with pytest.raises(UsageError, match="holds another result"):
            run("compare", **usual | changes)
    classifier(tmp_path / "c", ("d", "c", "b", "a"))  # another file in the same place
    with pytest.raises(UsageError, match="holds another result"):
        run("compare", **usual)


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (tuple("abxy"), None, "does not know 2 classes of toy-1: c, d; name its classes"),
        (None, "two.txt", "has 2 names, the classifier 4 classes"),
        (None, "FILE", "classes: FILE is not a file"),
    ],
)
def test_classes_that_do_not_fit_a_classifier_are_refused(
    run, tmp_path, monkeypatch, names, classes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match=message):
        run("compare", model=(classifier(tmp_path / "c", names),), test="toy-1", classes=classes)


def test_two_and_three_processes_find_what_one_does(run, tmp_path, capsys):
    words = "--train digits:split=test --test digits:split=test --methods knn --methods fewshot --shots 1"
    words = ["eval", "--model", run.usual["model"], *words.split(), "--device", "cpu", "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    one = written(tmp_path / "one" / "eval.json")["rows"]
    for world in (2, 3):  # they meet again for each method
        out = tmp_path / str(world)
        assert run_ranks(world, main, [*words, "--out", str(out)]) == [0] * world
        assert written(out / "eval.json")["rows"] == one
    assert run_ranks(2, main, words) == [2, 2]  # without --out
