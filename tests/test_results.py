"""A result is known by what it was made from, not by where that lies."""

import json
from dataclasses import replace

import pytest
from nextblock.evaluate.knn_config import KnnConfig

from nextblock.evaluate.results import differences, identity_of, refuse_other_result
from nextblock.models.next_block import NextBlockModel
from toy import DATA, ToySource, toy_model


def identity(model="run", source=None, data=DATA, encoder=None, **changes):
    config = KnnConfig(model=model, train="toy", **changes)
    return identity_of(config, encoder or toy_model(), data, {"train": source or ToySource(12)})


def configured(**changes):
    """The toy model's weights in a network of other settings."""
    model = toy_model()
    other = NextBlockModel(replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def test_another_place_of_the_same_model_and_images_is_no_other_result(tmp_path):
    (tmp_path / "knn.json").write_text(json.dumps(identity("run")))
    refuse_other_result(tmp_path, "knn.json", identity("/elsewhere/run/"), ())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (identity(source=ToySource(12, seed=1)), "sources.train.fingerprint"),
        (identity(source=ToySource(12, shuffled=True)), "sources.train.labels"),
        (identity(k=(3,)), "settings.k"),
        (identity(encoder=configured(num_heads=4)), r"encoder.num_heads: 2 there, 4 here\)"),
        (identity(encoder=configured(feature_attention="full")), "encoder.feature_attention"),
        (identity(data=replace(DATA, max_pixels=99)), "images.max_pixels"),
    ],
)
def test_other_images_labels_or_settings_are_named(tmp_path, other, message):
    (tmp_path / "knn.json").write_text(json.dumps(identity()))
    with pytest.raises(ValueError, match=message):
        refuse_other_result(tmp_path, "knn.json", other, ())


def test_settings_that_change_no_result_are_not_part_of_it():
    assert differences(identity(), identity(workers=3, max_bad_fraction=0.5, overwrite=True)) == []


def test_flips_are_no_part_of_what_never_flips():
    assert differences(identity(), identity(data=replace(DATA, flip=0.9))) == []


def test_of_another_version_only_that_is_said():
    old = {**identity(k=(3,)), "format_version": 1}
    assert differences(old, identity()) == ["written by another version of nextblock"]


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\); give another --out$"):
        refuse_other_result(tmp_path, "knn.json", identity(), ())


def test_what_an_encoder_predicted_with_is_no_part_of_it():
    predicting = configured(predictor="linear", projection_dim=None)
    assert differences(identity(encoder=predicting), identity(encoder=configured(projection_dim=None))) == []


def test_other_files_are_left_alone_when_another_result_is_overwritten(tmp_path):
    (tmp_path / "knn.json").write_text(json.dumps(identity(k=(3,))))
    refuse_other_result(tmp_path, "knn.json", identity(), (), overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\); give another --out$"):
        refuse_other_result(tmp_path, "knn.json", identity(), (), overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_is_ours_where_more_than_its_name_says_so(tmp_path, overwrite):
    def check():
        ours, begun = ("state.pt", "features"), ("state.pt", "features/*/about.json")
        refuse_other_result(tmp_path, "knn.json", identity(), ours, begun=begun, overwrite=overwrite)

    (tmp_path / "features" / "some").mkdir(parents=True)
    (tmp_path / "features" / "mine.npy").touch()
    with pytest.raises(ValueError, match=r"holds other files \(features\); give another --out$"):
        check()
    for path in ("features/some/about.json", "state.pt", "knn.json"):
        (tmp_path / path).write_text(json.dumps(identity()))
        check()
        (tmp_path / path).unlink()
