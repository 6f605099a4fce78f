"""Few labels: the regression against scikit-learn in full, the draws, the numbers over draws, the command."""

import csv
import json
import statistics

import numpy as np
import pytest
import torch
from nextblock.evaluate.fewshot_config import C_GRID, DEFAULT_C, FewshotConfig, Shots
from nextblock.evaluate.frozen import Opened
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.cli.fewshot import fewshot
from nextblock.data import Source, keyed_seed
from nextblock.evaluate.fewshot import comparison, draw_shots, fewshot_opened, regress, summary
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture


def some_classes(count, width, classes=3, seed=0):
    """Vectors around a centre for each class, of channels of very different sizes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    scale = np.exp(np.linspace(-3, 3, width))
    return (centres[labels] * 0.5 + rng.normal(size=(count, width))) * scale + 5, labels


def opened(model=None, *, train=48, test=40, **changes):
    sources: dict[str, Source] = {"train": ToySource(train, **changes), "test": ToySource(test, seed=1)}
    return Opened(model or toy_model(), DATA, sources)


def settings(**changes):
    return FewshotConfig(
        model="toy", train="toy-0", test="toy-1", device="cpu", **{"shots": ("2",), "seeds": 2, **changes}
    )


# ------------------------------------------------------------------------------------------- the regression


@pytest.mark.parametrize(("count", "width"), [(12, 40), (60, 5)])
def test_it_is_scikit_learns_regression_on_standardised_features(count, width):
    features, labels = some_classes(count, width)
    queries, _ = some_classes(30, width, seed=1)
    found = regress(features, labels, folds=3, seed=0)
    assert (found.basis is not None) == (count < width)  # in the span of the images the solution is the same
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=found.c, max_iter=5000, tol=1e-8))
    plain.fit(features, labels)
    np.testing.assert_allclose(found.log_p(queries), plain.predict_log_proba(queries), atol=2e-2)
    assert np.array_equal(found.log_p(queries).argmax(axis=1), plain.predict(queries))


@pytest.mark.slow
def test_the_penalty_is_the_strongest_of_those_that_do_best_in_cross_validation():
    features, labels = some_classes(60, 20)
    found = regress(features, labels, folds=5, seed=7)
    standard = StandardScaler().fit_transform(features)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=7).split(standard, labels))
    scores = {}
    for c in C_GRID:
        of_folds = []
        for kept, held in folds:
            one = LogisticRegression(C=c, max_iter=1000).fit(standard[kept], labels[kept])
            of_folds.append(one.score(standard[held], labels[held]))
        scores[c] = np.mean(of_folds)
    best = max(scores.values())
    assert found.chosen
    assert found.c == min(c for c in C_GRID if scores[c] == best)
    assert best > min(scores.values())


def test_with_one_image_of_a_class_the_penalty_is_the_stated_one():
    features, labels = some_classes(7, 4)  # three, two, two
    assert regress(features, labels, 5, seed=0).chosen
    one = regress(features[:5], labels[:5], 5, seed=0)  # two, two, one
    assert (one.chosen, one.c) == (False, DEFAULT_C)


def test_a_constant_channel_is_no_obstacle():
    features, labels = some_classes(12, 4)
    features[:, 0] = 7
    assert np.isfinite(regress(features, labels, 3, seed=0).log_p(features + 1)).all()


# ------------------------------------------------------------------------------------------------ the draws


def test_shots_are_images_of_every_class_or_a_share_of_each():
    source = ToySource(96)  # four classes of 24
    few = draw_shots(source, Shots.parse("3"), seed=0)
    assert np.bincount(source.labels[few]).tolist() == [3, 3, 3, 3]
    share = draw_shots(source, Shots.parse("25%"), seed=0)
    assert np.bincount(source.labels[share]).tolist() == [6, 6, 6, 6]
    assert not np.array_equal(few, draw_shots(source, Shots.parse("3"), seed=1))
    assert np.array_equal(few, draw_shots(source, Shots.parse("3"), seed=0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", Shots(per_class=5)), ("1%", Shots(share=0.01)), ("0.5%", Shots(share=0.005))],
)
def test_shots_are_read(text, expected):
    assert Shots.parse(text) == expected


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-1", "1.5", "all", "", "%"])
def test_what_is_no_number_of_labels_is_refused(text):
    with pytest.raises(
        ValueError, match="is no number of labels; write images a class, such as 5, or a share"
    ):
        Shots.parse(text)


def test_a_class_with_too_few_images_is_named():
    source = ToySource(10)  # three of a and b, two of c and d
    with pytest.raises(ValueError, match=r"classes of fewer than 3 images: c \(2\), d \(2\); draw at most 2"):
        draw_shots(source, Shots.parse("3"), seed=0)
    with pytest.raises(ValueError, match=r"10.0000% of toy-0 leaves 3 of its 4 classes without an image"):
        draw_shots(source, Shots.parse("10%"), seed=0)


# ------------------------------------------------------------------------------------------- the evaluation


def test_colours_are_learned_from_two_images_of_each():
    found = fewshot_opened(opened(), settings())
    row = found.row("trained", "2")
    assert row.top1 > 0.9
    assert (row.train_images, row.chosen, row.unconverged) == (8, True, 0)
    assert (found.measured_images, found.num_classes, found.layers) == (40, 4, (1,))
    assert list(dict.fromkeys(row.encoder for row in found.rows)) == ["trained", "untrained", "raw pixels"]


@pytest.mark.slow
def test_mean_and_deviation_are_those_of_the_draws():
    found = fewshot_opened(opened(shuffled=True), settings(shots=("1", "25%"), seeds=3))
    for row in found.rows:
        assert len(row.draws) == len(row.c) == 3
        assert row.top1 == statistics.fmean(row.draws)
        assert row.top1_std == pytest.approx(np.std(row.draws, ddof=1))
        assert row.chosen == (row.shots == "25%")
    assert len({row.top1 for row in found.rows}) > 1
    assert "With shots 1 some class has one image to learn from: there the penalty is not chosen but C 1" in (
        summary(found)
    )
    head, lines = comparison(found)
    assert head == ["shots", "images", "trained", "untrained", "raw pixels"]
    assert [line[:2] for line in lines] == [["1 a class", "4"], ["25%", "12"]]
    assert all(" ± " in line[2] for line in lines)


def test_a_single_draw_has_no_deviation():
    found = fewshot_opened(opened(), settings(seeds=1, baselines=False))
    (row,) = found.rows
    assert row.top1_std is None
    assert "±" not in comparison(found)[1][0][2]
    assert "of one draw" in summary(found)


def test_all_encoders_learn_from_the_same_images_and_only_those_are_encoded():
    model, source = toy_model(), ToySource(96, shuffled=True)
    given = Opened(model, DATA, {"train": source, "test": ToySource(40, seed=1)})
    config = settings(shots=("1",), seeds=2)
    found = fewshot_opened(given, config)
    assert source.reads <= 3 * 8  # three encoders, two draws of four classes
    again = fewshot_opened(given, config)
    assert [row.draws for row in again.rows] == [row.draws for row in found.rows]
    other = fewshot_opened(given, settings(shots=("1",), seeds=2, seed=5))
    assert [row.draws for row in other.rows] != [row.draws for row in found.rows]


def test_top1_is_what_the_drawn_images_teach():
    """By hand, on the raw pixels."""
    given, config = opened(shuffled=True), settings(shots=("3",), seeds=1)
    row = fewshot_opened(given, config).row("raw pixels", "3")
    train, test = given.sources["train"], given.sources["test"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (DATA.mean, DATA.std))

    def pixels(source):
        return ((source.images / 255 - mean) / std).flatten(1).double().numpy()

    drawn = draw_shots(train, Shots.parse("3"), keyed_seed(0, "few-shot draw", 0))
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=row.c[0], max_iter=5000))
    plain.fit(pixels(train)[drawn], train.labels[drawn])
    assert row.top1 == pytest.approx(plain.score(pixels(test), test.labels), abs=1 / 40)


def test_unreadable_images_are_left_out_and_a_class_of_them_alone_is_refused():
    given = opened(train=16, bad={0, 1})  # one of four of classes a and b
    found = fewshot_opened(given, settings(shots=("4",), seeds=1))
    assert found.rows[0].train_images == 14
    assert dict(found.bad_images) == {"train": 2, "test": 0}
    given = opened(train=8, bad={0, 4})  # both of class a
    with pytest.raises(
        ValueError, match=r"shots 2: of 1 classes \(a\) no drawn image of toy-0 could be read"
    ):
        fewshot_opened(given, settings(seeds=1))


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_writes_its_table(tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", toy_model())
    words = ["fewshot", "--model", str(tmp_path / "model.safetensors"), "--train", "digits:split=train"]
    words += ["--test", "digits:split=test", "--shots=1", "--shots=2%", "--seeds=2", "--device=cpu", "--out"]
    assert main([*words, str(tmp_path / "out"), "--json"]) == 0
    told = capsys.readouterr().out
    result = json.loads(told.splitlines()[-1])
    written = json.loads((tmp_path / "out" / "fewshot.json").read_text())
    assert written["rows"] == result["rows"]
    assert [row["shots"] for row in result["rows"]] == ["1", "2%"] * 3
    assert {row["train_images"] for row in result["rows"]} == {10, 29}
    with (tmp_path / "out" / "fewshot.csv").open() as file:
        assert [float(line["top1"]) for line in csv.DictReader(file)] == [
            row["top1"] for row in result["rows"]
        ]
    assert "| 1 a class | 10 | " in (tmp_path / "out" / "fewshot.md").read_text()
    assert main([*words, str(tmp_path / "out"), "--seeds", "3"]) == 2
    assert "holds another result (settings.seeds: 2 there, 3 here)" in capsys.readouterr().err


def test_python_calls_it_with_lists_and_paths(tmp_path):
    save_model(tmp_path / "model.safetensors", toy_model())
    digits = {"train": "digits:split=train", "test": "digits:split=test"}
    found = fewshot(
        model=tmp_path / "model.safetensors", **digits, shots=["1"], seeds=1, baselines=False, device="cpu"
    )
    assert found.measured_images == 360


def test_missing_labels_and_a_missing_test_are_told(tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", toy_model())
    model = ["--model", str(tmp_path / "model.safetensors")]
    assert main(["fewshot", *model, "--train", "digits:split=train"]) == 2
    assert "--test must be given" in capsys.readouterr().err
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "flat" / "one.png")
    words = ["--train", str(tmp_path / "flat"), "--test", "digits:split=test"]
    assert main(["fewshot", *model, *words]) == 2
    assert "label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": ()}, r"shots are \[\]; name at least one"),
        ({"shots": ("5", "5")}, "each once"),
        ({"shots": ("many",)}, "shots 'many' is no number of labels"),
        ({"seeds": 0}, "seeds is 0; use at least 1"),
        ({"folds": 1}, "folds is 1; use at least 2"),
        ({"layers": "each"}, "layers is 'each'; use last"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_two_classes_far_apart_have_finite_log_probabilities():
    features = np.concatenate([np.full((6, 4), -1e6), np.full((6, 4), 1e6)])
    features += np.random.default_rng(0).normal(size=features.shape)
    found = regress(features, np.repeat([0, 1], 6), folds=3, seed=0)
    log_p = found.log_p(1e6 * features)
    assert np.isfinite(log_p).all()
    assert (log_p.argmax(axis=1) == np.repeat([0, 1], 6)).all()
