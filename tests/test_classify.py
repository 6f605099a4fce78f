"""Classification: the classifier's own logits and names, accuracy where it can be told, files, refusals."""

import csv
import json
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow.parquet
import pytest
import torch
from nextblock.evaluate.classify_config import ClassifyConfig

import nextblock
from nextblock.checkpoint import save_classifier, save_model
from nextblock.cli import main
from nextblock.data import TooManyBadImages, eval_batches, normalize
from nextblock.evaluate.classify import classify_images
from nextblock.evaluate.features import seeded
from nextblock.interop import open_encoder
from nextblock.models.heads import HeadConfig, ImageClassifier
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CONFIG = ClassifyConfig(model="RUN", data="toy-0", top=3, encode_batch_size=4, device="cpu")
NAMES = ("d", "c", "b", "a")  # in another order than the source's


def classifier(kind: Literal["attentive", "linear"] = "attentive", names=NAMES, model=None, count=4):
    config = HeadConfig(kind=kind, num_classes=count, layers=(0, 1), num_heads=4)
    with seeded(3):
        made = ImageClassifier(model or toy_model(), config, names)
        torch.nn.init.normal_(made.head.linear.weight, std=0.5)
    return made.eval()


def logits(made, source, size=16):
    (batch,) = eval_batches(source, DATA, size, len(source))
    with torch.no_grad():
        return made(normalize(batch.images, DATA.mean, DATA.std)), batch.samples


@pytest.mark.parametrize("kind", ["attentive", "linear"])
def test_classes_and_probabilities_are_the_classifiers_own(kind):
    made, source = classifier(kind), ToySource(10, bad={4})
    result = classify_images(made, CONFIG, source, DATA)
    own, samples = logits(made, source)
    probabilities = own.exp() / own.exp().sum(1, keepdim=True)
    assert [row.index for row in result.rows] == samples.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    for row, expected in zip(result.rows, probabilities, strict=True):
        order = sorted(range(4), key=lambda number: -float(expected[number]))[:3]
        assert row.classes == tuple(NAMES[number] for number in order)
        np.testing.assert_allclose(row.probabilities, expected[order], atol=1e-5)
        assert row.name == f"toy-0[{row.index}]"
        assert row.true_class == "abcd"[row.index % 4]
    assert [bad.name for bad in result.bad] == ["toy-0[4]"]


def test_accuracy_counts_classes_by_name_not_by_number():
    made, source = classifier(), ToySource(40)
    result = classify_images(made, CONFIG, source, DATA)
    own, _ = logits(made, source)
    right = np.mean([NAMES[int(n)] == "abcd"[i % 4] for i, n in enumerate(own.argmax(1))])
    assert result.measures is not None
    assert result.measures.images == 40
    assert result.measures.top1 == pytest.approx(right)
    assert 0 < right < 1


def test_a_source_of_some_of_the_classes_is_measured_too():
    made = classifier(names=("e", *NAMES), count=5)
    assert classify_images(made, CONFIG, ToySource(8), DATA).measures is not None


@pytest.mark.parametrize("names", [None, ("a", "b", "c", "x")])
def test_labels_of_other_classes_are_not_measured(names):
    result = classify_images(classifier(names=names), CONFIG, ToySource(6), DATA)
    assert result.measures is None
    assert result.rows[0].true_class == "a"
    if names is None:
        assert set(result.rows[0].classes) < set("0123")


def test_a_classifier_on_a_timm_encoder_classifies():
    model = open_encoder("timm:vit_tiny_patch16_224,pretrained=false,img_size=32")
    made, source = classifier(model=model), ToySource(3)
    result = classify_images(made, replace(CONFIG, top=1), source, DATA)
    own, _ = logits(made, source, size=32)
    assert [row.classes[0] for row in result.rows] == [NAMES[int(n)] for n in own.argmax(1)]


def test_more_classes_than_there_are_become_all():
    row = classify_images(classifier(), replace(CONFIG, top=50), ToySource(2), DATA).rows[0]
    assert sorted(row.classes) == sorted(NAMES)
    assert sum(row.probabilities) == pytest.approx(1)


def test_too_many_unreadable_images_stop_it():
    with pytest.raises(TooManyBadImages, match=r"toy-0\[2\]: truncated"):
        classify_images(classifier(), CONFIG, ToySource(4, bad={0, 1, 2}), DATA)


# --------------------------------------------------------------------------------------- files and command


@pytest.fixture
def saved(tmp_path):
    names = tuple("0123456789")
    save_classifier(tmp_path / "attentive", classifier(names=names, count=10), data=DATA)
    return tmp_path / "attentive"


def words(saved, *more):
    return ["classify", "--model", str(saved), "--data", "digits:split=test", "--device", "cpu", *more]


def test_the_command_prints_the_first_and_writes_all(saved, tmp_path, capsys):
    batch = ["--encode_batch_size", "90"]
    for name in ("a.csv", "a.json", "a.parquet"):
        assert main(words(saved, *batch, "--top", "2", "--out", str(tmp_path / name), "--json")) == 0
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert "and 350 images more" in printed
    assert "of 360 labelled images" in printed
    assert told["measures"]["images"] == len(told["rows"]) == 360
    assert json.loads((tmp_path / "a.json").read_text()) == told
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "index",
        "name",
        "class",
        "probability",
        "class_2",
        "probability_2",
        "true_class",
    ]
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for ours, line, column in zip(told["rows"], rows, table, strict=True):
        assert ours["name"] == line["name"] == column["name"]
        assert ours["classes"] == [line["class"], line["class_2"]] == column["classes"]
        assert float(line["probability"]) == pytest.approx(ours["probabilities"][0], abs=1e-6)


def test_python_gives_the_rows(saved):
    found = nextblock.classify(model=saved, data="digits:split=test", encode_batch_size=90, device="cpu")
    assert len(found.rows) == 360
    assert len(found.rows[0].classes) == 5


def test_a_file_that_is_there_is_kept_unless_asked(saved, tmp_path, capsys):
    out = tmp_path / "a.csv"
    out.write_text("mine")
    assert main(words(saved, "--out", str(out))) == 2
    assert "is there already; give another --out, or --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(words(saved, "--out", str(out), "--overwrite", "--encode_batch_size", "90")) == 0
    assert out.read_text().startswith("index,name,class")


def test_the_directory_of_a_fine_tuning_stands_for_its_classifier(saved, tmp_path, capsys):
    (tmp_path / "tuned").mkdir()
    saved.rename(tmp_path / "tuned" / "classifier")
    assert main(words(tmp_path / "tuned", "--encode_batch_size", "90")) == 0
    assert "of 360 labelled images" in capsys.readouterr().out


def test_a_model_without_a_head_is_refused(tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", toy_model(), data=DATA)
    assert main(words(tmp_path / "model.safetensors")) == 1
    assert "holds no classification head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "x.txt"}, "must end in .csv"),
        ({"top": 0}, "use at least 1"),
        ({"encode_batch_size": 0}, "use at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ClassifyConfig(model="m", data="d", **changes)
