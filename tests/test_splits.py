"""Labelled sources: classes matched by name, what is refused or warned of, and hold-outs."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from nextblock.config import DataConfig
from nextblock.errors import UsageError
from nextblock.evaluate import splits
from nextblock.evaluate.splits import hold_out, open_labelled, source_notes
from toy import DATA, ToySource


@pytest.fixture
def known(monkeypatch):
    """`known(train, test)` opens two toy sources."""

    def of(train, test):
        sources = {"train": train, "test": test}
        monkeypatch.setattr(splits, "open_source", lambda spec, data: sources[spec])
        return open_labelled({"train": "train", "test": "test"}, DATA)

    return of


def folder(path, classes, count=3, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                path / name / f"{number}.png"
            )
    return str(path)


def test_classes_are_matched_by_name_whatever_their_order(known):
    found = known(ToySource(8), ToySource(8, seed=1, class_names=("d", "b", "c", "a")))
    assert found["train"].labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert found["test"].labels.tolist() == [3, 1, 2, 0, 3, 1, 2, 0]
    assert source_notes(found) == []


def test_classes_without_an_image_are_named(known):
    found = known(ToySource(8, class_names=("a", "b", "c", "d")), ToySource(2, seed=1))
    assert source_notes(found) == ["toy-1 has no image of 2 classes of train: c, d"]


def test_a_class_that_train_lacks_is_refused(known):
    with pytest.raises(UsageError, match="toy-1 has 1 class that toy-0 lacks: e; remove these"):
        known(ToySource(8), ToySource(8, seed=1, class_names=("a", "b", "c", "e")))


def test_a_name_without_images_is_no_class_that_train_lacks(known):
    names = ("a", "b", "c", "d", "e")
    assert source_notes(known(ToySource(8), ToySource(8, seed=1, class_names=names))) == []


def test_one_class_is_refused(tmp_path):
    spec = folder(tmp_path / "d", ["cat"])
    with pytest.raises(UsageError, match=r"has only one class \(cat\); give images of at least two"):
        open_labelled({"train": spec}, DataConfig())


def test_images_without_labels_are_refused(tmp_path):
    spec = folder(tmp_path, ["cat"]) + "/cat"
    with pytest.raises(UsageError, match="label"):
        open_labelled({"train": spec}, DataConfig())


def test_images_that_are_in_both_are_warned_of_under_whatever_name(tmp_path, caplog):
    plain = folder(tmp_path / "d", ["cat", "dog"])
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(plain, ".")
    pairs = [
        ("digits", "digits:split=test", "200 of 200 images compared of test"),
        (plain, str(tmp_path / "d.tar"), "6 of 6 images compared of test"),
    ]
    for train, test, words in pairs:
        caplog.clear()
        splits.warn_once.cache_clear()
        first, found = (open_labelled({"train": train, "test": test}, DataConfig()) for _ in range(2))
        (warning,) = caplog.messages
        assert source_notes(first) == source_notes(found) == [warning]
        assert words in warning
        assert "are also in train: accuracy on them says nothing about new images" in warning
    caplog.clear()
    open_labelled({"train": plain, "test": folder(tmp_path / "e", ["cat", "dog"], seed=1)}, DataConfig())
    open_labelled({"train": "digits:split=train", "test": "digits:split=test"}, DataConfig())
    assert caplog.messages == []


def test_a_hold_out_is_a_share_of_every_class_and_depends_on_the_seed_alone():
    labels = np.array([0] * 30 + [1] * 10 + [2] * 2 + [3])
    kept, held = hold_out(labels, 0, share=0.2)
    assert np.bincount(labels[held], minlength=4).tolist() == [6, 2, 1, 0]
    assert sorted([*kept, *held]) == list(range(43))
    again, other = hold_out(labels, 0, share=0.2)[1], hold_out(labels, 1, share=0.2)[1]
    assert np.array_equal(held, again)
    assert not np.array_equal(held, other)
