"""A result is known by what it was made from, not by where that lies."""

import json

import pytest

from nextblock.evaluate.knn_config import KnnConfig
from nextblock.evaluate.results import differences, identity_of, refuse_other_result
from toy import DATA, ToySource, toy_model


def identity(model="run", source=None, **changes):
    config = KnnConfig(model=model, train="toy", **changes)
    return identity_of(config, toy_model(), DATA, {"train": source or ToySource(12)})


def test_another_place_of_the_same_model_and_images_is_no_other_result(tmp_path):
    (tmp_path / "knn.json").write_text(json.dumps(identity("run")))
    refuse_other_result(tmp_path, "knn.json", identity("/elsewhere/run/"), ())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (identity(source=ToySource(12, seed=1)), "sources.train.fingerprint"),
        (identity(source=ToySource(12, shuffled=True)), "sources.train.labels"),
        (identity(k=(3,)), "settings.k"),
    ],
)
def test_other_images_labels_or_settings_are_named(tmp_path, other, message):
    (tmp_path / "knn.json").write_text(json.dumps(identity()))
    with pytest.raises(ValueError, match=message):
        refuse_other_result(tmp_path, "knn.json", other, ())


def test_settings_that_change_no_result_are_not_part_of_it():
    assert differences(identity(), identity(workers=3, max_bad_fraction=0.5, overwrite=True)) == []


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\); give another --out$"):
        refuse_other_result(tmp_path, "knn.json", identity(), ())
