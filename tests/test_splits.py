"""Labelled sources: classes matched by name, what is refused or warned of, and hold-outs."""

import tarfile

import numpy as np
import pytest

from nextblock.config import DataConfig
from nextblock.errors import UsageError
from nextblock.evaluate import splits
from nextblock.evaluate.splits import hold_out, open_labelled, source_notes
from tiny_runs import write_images
from toy import DATA, ToySource


@pytest.fixture
def known(monkeypatch):
    """`known(train, test)` opens two toy sources, each (number of images, letters that name the classes)."""

    def of(train, test):
        sources = {
            name: ToySource(count, seed=seed, class_names=tuple(letters))
            for seed, (name, (count, letters)) in enumerate({"train": train, "test": test}.items())
        }
        monkeypatch.setattr(splits, "open_source", lambda spec, data: sources[spec])
        return open_labelled({"train": "train", "test": "test"}, DATA)

    return of


@pytest.mark.parametrize(
    ("test", "labels", "notes"),
    [
        ((8, "dbca"), [3, 1, 2, 0, 3, 1, 2, 0], []),
        ((2, "abcd"), [0, 1], ["toy-1 has no image of 2 classes of train: c, d"]),
        ((8, "abcde"), [0, 1, 2, 3, 0, 1, 2, 3], []),  # a name without images is no class that train lacks
    ],
)
def test_classes_are_matched_by_name_and_those_without_an_image_are_named(known, test, labels, notes):
    found = known((8, "abcd"), test)
    assert found["train"].labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert found["test"].labels.tolist() == labels
    assert source_notes(found) == notes


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((1, "a"), (1, "a"), r"toy-0 has only one class \(a\); give images of at least two"),
        ((8, "abcd"), (8, "abce"), "toy-1 has 1 class that toy-0 lacks: e; remove these"),
    ],
)
def test_a_single_class_and_one_that_train_lacks_are_refused(known, train, test, message):
    with pytest.raises(UsageError, match=message):
        known(train, test)


def test_images_that_are_in_both_are_warned_of_under_whatever_name(tmp_path, caplog):
    for name in ("cat", "dog"):  # the same three images
        write_images(tmp_path / "d" / name, 3)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "d", ".")
    pairs = [
        ("digits", "digits:split=test", "200 of 200 images compared of test"),
        (str(tmp_path / "d"), str(tmp_path / "d.tar"), "3 of 3 images compared of test"),
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
