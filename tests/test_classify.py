"""Classification: the classifier's own logits and names, accuracy if it can be measured, files, refusals."""

import csv
import json
from typing import Literal

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from evaluating import toy_verb, written  # noqa: F401 - a fixture
from nextblock.checkpoint import CheckpointError, save_classifier
from nextblock.cli import main
from nextblock.data import TooManyBadImages, eval_batches, normalize
from nextblock.errors import UsageError
from nextblock.evaluate.features import seeded
from nextblock.interop import open_encoder
from nextblock.models.heads import HeadConfig, ImageClassifier
from toy import DATA, ToySource, toy_model

NAMES = ("d", "c", "=b", "a")  # in another order than the source's


def classifier(kind: Literal["attentive", "linear"] = "linear", names=NAMES, model=None, count=4):
    config = HeadConfig(kind=kind, num_classes=count, layers=(0, 1), num_heads=4)
    with seeded(3):
        made = ImageClassifier(model or toy_model(), config, names)
        torch.nn.init.normal_(made.head.linear.weight, std=0.5)
    return made.eval()


@pytest.fixture
def classify(run, tmp_path):
    """`classify(made, **settings)` saves a classifier and calls the verb."""
    run.sources["toy-0"] = ToySource(12, bad={4}, class_names=("a", "=b", "c", "d"))

    def call(made=None, **settings):
        save_classifier(tmp_path / "classifier", made or classifier(), data=DATA)
        return run("classify", model=tmp_path / "classifier", data="toy-0", **settings)

    return call


def probabilities(made, source, size=16):
    (batch,) = eval_batches(source, DATA, size, len(source))
    with torch.no_grad():
        logits = made(normalize(batch.images, DATA.mean, DATA.std))
    return (logits.exp() / logits.exp().sum(1, keepdim=True)).numpy(), batch.samples.numpy()


@pytest.mark.parametrize("kind", ["attentive", "linear"])
def test_classes_and_probabilities_are_the_classifiers_own(classify, run, tmp_path, kind):
    made, source, out = classifier(kind), run.sources["toy-0"], tmp_path / "out.json"
    found = classify(made, top=3, out=out, encode_batch_size=5)
    rows, (own, samples) = written(out), probabilities(made, source)
    assert [row["index"] for row in rows] == samples.tolist() == [0, 1, 2, 3, *range(5, 12)]
    for row, expected in zip(rows, own, strict=True):
        order = sorted(range(4), key=lambda number: -float(expected[number]))[:3]
        assert row["classes"] == [NAMES[number] for number in order]
        np.testing.assert_allclose(row["probabilities"], expected[order], atol=1e-5)
        assert row["name"] == f"toy-0[{row['index']}]"
        assert row["true_class"] == source.class_names[row["index"] % 4]
    assert list(found.rows) == rows[:10]
    right = [NAMES[int(n)] == source.class_names[i % 4] for n, i in zip(own.argmax(1), samples, strict=True)]
    assert 0 < np.mean(right) < 1
    assert found.facts["measures"]["top1"] == pytest.approx(np.mean(right))
    assert (found.facts["num_images"], found.facts["bad_images"]) == (11, {"data": 1})
    for row in classify(made, top=50).rows:  # more than all is all
        assert sorted(row["classes"]) == sorted(NAMES)
        assert sum(row["probabilities"]) == pytest.approx(1)


def test_a_classifier_of_more_or_fewer_classes_or_without_names_is_measured_if_it_can_be(classify):
    assert classify(classifier(names=("e", *NAMES), count=5)).facts["measures"]["images"] == 11
    for names in (None, ("a", "b", "c", "x"), ("a", "b")):
        found = classify(classifier(names=names, count=len(names or NAMES)))
        assert found.facts["measures"] is None
        assert found.notes[-1] == "No accuracy: the classifier does not know all of these images' classes."
        assert set(found.rows[0]["classes"]) == set(names or "0123")
    assert found.table.head == ["image", "likeliest", "second", "true class"]  # of two classes


def test_a_classifier_on_a_timm_encoder_classifies(classify, run):
    made = classifier(model=open_encoder("timm:vit_tiny_patch16_224,pretrained=false,img_size=32"))
    found = classify(made, top=1)
    own, _ = probabilities(made, run.sources["toy-0"], size=32)
    assert [row["classes"][0] for row in found.rows] == [NAMES[int(n)] for n in own.argmax(1)[:10]]


def test_every_format_holds_the_same_and_formulas_are_quoted_for_spreadsheets(classify, tmp_path):
    for suffix in ("csv", "json", "parquet"):
        classify(top=2, out=tmp_path / f"out.{suffix}")
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = written(tmp_path / "out.json")
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows
    names = "index name class_1 probability_1 class_2 probability_2 true_class"
    assert list(lines[0]) == names.split()
    for row, line in zip(rows, lines, strict=True):
        quoted = [name.replace("=b", "'=b") for name in (*row["classes"], row["true_class"])]
        assert [line["class_1"], line["class_2"], line["true_class"]] == quoted
        assert float(line["probability_1"]) == pytest.approx(row["probabilities"][0], abs=1e-6)
        assert (int(line["index"]), line["name"]) == (row["index"], row["name"])
    assert "'=b" in str(lines)
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_is_there_is_kept_unless_asked(classify, tmp_path):
    out = tmp_path / "a.csv"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists; choose another --out, or give --overwrite"):
        classify(out=out)
    assert out.read_text() == "mine"
    first = classify(out=out, overwrite=True)
    assert out.read_text().startswith("index,name,class_1")
    # The same command reads what it wrote, another one is refused.
    written_at = out.stat().st_mtime_ns
    again = classify(out=out)
    assert (again.rows, again.facts, again.notes) == (first.rows, first.facts, first.notes)
    assert again.table.markdown() == first.table.markdown()
    assert out.stat().st_mtime_ns == written_at
    with pytest.raises(UsageError, match="top: 5 there, 1 here"):
        classify(out=out, top=1)


def test_the_command_classifies_one_image_by_the_classifier_of_a_fine_tuning(classify, tmp_path, capsys):
    save_classifier(tmp_path / "tuned" / "classifier", classifier(), data=DATA)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "one.png")
    words = ["classify", "--model", str(tmp_path / "tuned"), "--data", str(tmp_path / "one.png")]
    assert main([*words, "--device", "cpu", "--workers", "0", "--json"]) == 0
    printed = capsys.readouterr().out
    assert "one.png" in printed
    (row,) = json.loads(printed.splitlines()[-1])["rows"]
    assert (row["true_class"], len(row["classes"])) == (None, 4)


def test_too_many_unreadable_images_and_models_without_a_head_are_refused(classify, run, tmp_path):
    run.sources["toy-0"] = ToySource(4, bad={0, 1, 2})
    with pytest.raises(TooManyBadImages, match=r"toy-0\[2\]: truncated"):
        classify()
    with pytest.raises(CheckpointError, match="holds no classification head"):
        run("classify", data="toy-0")
    save_classifier(tmp_path / "probe" / "linear", classifier(), data=DATA)
    with pytest.raises(UsageError, match=r"give --model .*probe/linear$"):
        run("classify", data="toy-0", model=tmp_path / "probe")
