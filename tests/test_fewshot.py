"""Few labels: the regression against scikit-learn, the draws, the numbers over draws."""

import statistics

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from evaluating import toy_table, toy_verb  # noqa: F401 - a fixture
from nextblock.data import keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate import splits
from nextblock.evaluate.evaluation import BASELINES, MODEL
from nextblock.evaluate.fewshot import C_GRID, DEFAULT_C, draw_shots, regress
from nextblock.evaluate.settings import FewshotSettings, Shots
from toy import ToySource, one_thread  # noqa: F401 - a fixture


def some_classes(count, width, classes=3, seed=0):
    """Vectors around a centre for each class, of channels of very different sizes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    scale = np.exp(np.linspace(-3, 3, width))
    return (centres[labels] * 0.5 + rng.normal(size=(count, width))) * scale + 5, labels


def best_penalty(features, labels, folds, seed):
    """Slowly, each fold standardised by its own training part: the strongest penalty that does best."""
    scores = {}
    for c in C_GRID:
        of_folds = []
        for kept, held in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, labels):
            scaler = StandardScaler().fit(features[kept])
            one = LogisticRegression(C=c, max_iter=1000).fit(scaler.transform(features[kept]), labels[kept])
            of_folds.append(one.score(scaler.transform(features[held]), labels[held]))
        scores[c] = np.mean(of_folds)
    assert max(scores.values()) > min(scores.values())
    return max(C_GRID, key=lambda c: (scores[c], -c))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_penalty_is_chosen_by_cross_validation_that_does_not_leak_scaling(seed):
    features, labels = some_classes(9, 12, seed=seed)  # scaled beforehand, another penalty would win
    queries, _ = some_classes(20, 12, seed=50)
    found = regress(features, labels, folds=5, seed=seed)
    c = best_penalty(features, labels, 3, seed)
    assert found["logisticregression"].get_params()["C"] == c
    scaler = StandardScaler().fit(features)
    plain = LogisticRegression(C=c, max_iter=1000).fit(scaler.transform(features), labels)
    np.testing.assert_allclose(found.predict_proba(queries), plain.predict_proba(scaler.transform(queries)))


def test_folds_are_as_many_as_the_smallest_class_has_images_and_with_one_the_penalty_is_fixed():
    features, labels = some_classes(8, 4)  # three, three, two
    one = regress(features[:5], labels[:5], 5, seed=0)  # two, two, one
    for fit, c in ((regress(features, labels, 5, 0), best_penalty(features, labels, 2, 0)), (one, DEFAULT_C)):
        assert fit["logisticregression"].get_params()["C"] == c


# ------------------------------------------------------------------------------------------------ the draws


def test_shots_are_images_of_every_class_or_a_share_of_each():
    source = ToySource(96)  # four classes of 24
    few = draw_shots(source, Shots.parse("3"), seed=0)
    assert np.bincount(source.labels[few]).tolist() == [3, 3, 3, 3]
    share = draw_shots(source, Shots.parse("25%"), seed=0)
    assert np.bincount(source.labels[share]).tolist() == [6, 6, 6, 6]
    assert not np.array_equal(few, draw_shots(source, Shots.parse("3"), seed=1))
    assert np.array_equal(few, draw_shots(source, Shots.parse("3"), seed=0))


def test_several_shots_may_be_one_list_as_the_help_shows_it():
    assert FewshotSettings(model="x", train="a", test="b", shots=("1,5", "10%")).shots == ("1", "5", "10%")


def test_a_share_that_leaves_a_class_empty_is_refused():
    with pytest.raises(UsageError, match=r"1% of toy-0 leaves 3 of its 4 classes without an image"):
        draw_shots(ToySource(96), Shots.parse("1%"), seed=0)


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-1", "1.5", "all", "", "%"])
def test_what_is_no_number_of_labels_is_refused(text):
    with pytest.raises(UsageError, match="write images of every class, such as 5, or a share"):
        Shots.parse(text)


# ------------------------------------------------------------------------------------------- the evaluation


def test_numbers_are_means_over_draws(run):
    run.sources |= {"toy-0": ToySource(48, shuffled=True), "toy-1": ToySource(40, seed=1)}
    found = run("fewshot", train="toy-0", test="toy-1", shots=("2", "25%"), draws=3, baselines=False)
    row, source, test = found.row(shots="2"), run.sources["toy-0"], run.sources["toy-1"]
    known, asked = toy_table(source), toy_table(test)
    known.fill()
    asked.fill()
    top1 = []
    for number in range(3):
        indices = draw_shots(source, Shots.parse("2"), keyed_seed(0, "few-shot draw", number))
        features, queries = (
            known.read(indices).double().numpy(),
            asked.read(asked.readable()).double().numpy(),
        )
        fit = regress(features, source.labels[indices], 5, keyed_seed(0, "folds", number) % 2**32)
        top1.append((fit.predict(queries) == test.labels).mean())
    assert row["draws"] == top1
    assert row["top1"] == statistics.fmean(top1)
    assert row["top1_std"] == statistics.stdev(top1) > 0
    assert row["top1_se"] == pytest.approx(statistics.stdev(top1) / 3**0.5)
    assert (row["train_images"], found.row(shots="25%")["train_images"]) == (8, 12)
    assert "mean of 3 draws ± its standard error, on 40 test images" in found.notes[0]


def test_baselines_learn_from_the_same_few_images_and_no_others_are_encoded(run, monkeypatch):
    monkeypatch.setattr(splits, "shared_images", lambda *_: None)  # which reads images as well
    found = run("fewshot", train="toy-0", test="toy-1", shots=("1",), draws=1)
    assert [row["encoder"] for row in found.rows] == [MODEL, *BASELINES]
    assert run.sources["toy-0"].reads == 4 * 4
    assert all("lead" in row for row in found.rows[1:])
    row = found.rows[0]
    assert (row["top1_se"], row["top1_std"], row["c"]) == (None, None, [DEFAULT_C])
    assert "one draw" in found.notes[0]
    assert "; if a class has only one, C is 1." in found.notes[0]


def test_a_draw_without_a_readable_image_of_a_class_is_refused(run):
    run.sources["toy-0"] = ToySource(8, bad={1, 5})
    with pytest.raises(UsageError, match=r"labels 1: no drawn image of 1 class of toy-0 is readable \(b\)"):
        run("fewshot", train="toy-0", test="toy-1", shots=("1",), draws=1, baselines=False)


def test_more_images_than_a_class_has_are_left_out_and_refused_if_nothing_is_left(run):
    usual = {"train": "toy-0", "test": "toy-1", "draws": 1, "baselines": False}
    found = run("fewshot", **usual, shots=("1", "13"))
    assert [row["shots"] for row in found.rows] == ["1"]
    assert "Labels 13 not measured: 'toy-0' has classes of fewer than 13 images" in found.notes[-1]
    with pytest.raises(UsageError, match=r"\(--shots 12\)"):
        run("fewshot", **usual, shots=("13",))
