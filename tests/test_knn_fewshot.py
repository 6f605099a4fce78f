"""kNN and few labels: against slow definitions and scikit-learn, their limits, and leads over baselines."""

import shutil
import statistics
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from evaluating import toy_table, toy_verb  # noqa: F401 - a fixture
from nextblock.data import keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate import splits
from nextblock.evaluate.features import small_pixels_extract
from nextblock.evaluate.fewshot import C_GRID, DEFAULT_C, draw_shots, regress
from nextblock.evaluate.knn import nearest_neighbours, predict_all
from nextblock.evaluate.metrics import paired
from nextblock.evaluate.results import BASELINES, MODEL, SATURATED, add_leads
from nextblock.evaluate.settings import FewshotSettings, Shots
from tiny_runs import write_images
from toy import ToySource

CPU = torch.device("cpu")


def encoded(source, extract=None):
    """The features of a source's readable images, and their labels."""
    table = toy_table(source, extract)
    table.fill()
    return table.read(table.readable()), source.labels[table.readable()]


def some_vectors(count, seed=0, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def knn_predict(queries, neighbours, labels, num_classes, *, k=20, temperature=0.07):
    """The classes that one setting gives."""
    (found,) = predict_all(queries, neighbours, labels, num_classes, [(k, temperature)], CPU)
    return found


def test_prediction_is_the_class_with_the_most_weight_among_the_nearest():
    queries, neighbours, labels = some_vectors(20), some_vectors(50, seed=1), torch.arange(50) % 3
    predicted = knn_predict(queries, neighbours, labels, 3, k=7, temperature=0.5)
    for query, answer in zip(queries, predicted, strict=True):
        similarity = [float(query @ one / query.norm() / one.norm()) for one in neighbours]
        votes = np.zeros(3)
        for row in sorted(range(50), key=lambda row: -similarity[row])[:7]:
            votes[labels[row]] += np.exp(similarity[row] / 0.5)
        assert answer == votes.argmax()


def test_at_high_temperature_it_is_scikit_learns_plain_vote():
    queries, neighbours, labels = some_vectors(60), some_vectors(50, seed=1), torch.arange(50) % 2
    for k in (1, 5, 9):  # odd, and two classes: no ties
        plain = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(neighbours, labels)
        predicted = knn_predict(queries, neighbours, labels, 2, k=k, temperature=1e6)
        assert predicted.tolist() == plain.predict(queries).tolist()


def test_a_low_temperature_does_not_overflow():
    predicted = knn_predict(torch.eye(4), torch.eye(4), torch.arange(4), 4, temperature=1e-4)
    assert predicted.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_the_nearest_come_first_however_many_are_compared_at_a_time_and_no_query_finds_itself(chunk):
    neighbours, rows = F.normalize(some_vectors(50, seed=1), dim=-1), torch.tensor([3, 49, 0])
    for queries, k, most, itself in ((some_vectors(9), 12, 12, None), (neighbours[rows], 100, 49, rows)):
        similarity = F.normalize(queries, dim=-1) @ neighbours.T
        if itself is not None:
            similarity[range(3), itself] = -np.inf
        best = similarity.sort(dim=-1, descending=True)
        found = nearest_neighbours(queries, neighbours, k, itself=itself, chunk=chunk)
        assert torch.equal(found.rows, best.indices[:, :most])
        torch.testing.assert_close(found.similarity, best.values[:, :most])


def test_with_nothing_asked_each_image_is_predicted_by_all_others(monkeypatch):
    monkeypatch.setattr("nextblock.evaluate.knn.QUERIES", 7)
    vectors, labels = some_vectors(30), torch.arange(30) % 4
    settings = [(1, 0.07), (4, 0.07), (4, 1.0)]
    found = predict_all(None, vectors, labels, 4, settings, CPU)
    for (k, temperature), predicted in zip(settings, found, strict=True):
        for row in range(30):
            others = [other for other in range(30) if other != row]
            known = (vectors[others], labels[others], 4)
            assert predicted[row] == knn_predict(vectors[[row]], *known, k=k, temperature=temperature)


def test_every_row_is_what_its_setting_gives_alone(run):
    run.sources |= {"toy-0": ToySource(48, shuffled=True), "toy-1": ToySource(32, seed=1, bad={3})}
    found = run("knn", train="toy-0", test="toy-1", k=(1, 3, 20), temperature=(0.07, 1.0))
    assert [row["encoder"] for row in found.rows[::6]] == [MODEL, *BASELINES]
    for encoder, extract in ((MODEL, None), ("pixels 16x16", small_pixels_extract)):
        features, labels = encoded(run.sources["toy-0"], extract)
        queries, truth = encoded(run.sources["toy-1"], extract)
        for k, temperature in product((1, 3, 20), (0.07, 1.0)):
            known = (features, torch.from_numpy(labels), 4)
            predicted = knn_predict(queries, *known, k=k, temperature=temperature).numpy()
            row = found.row(encoder=encoder, k=k, temperature=temperature)
            top1 = (predicted == truth).mean()
            assert row["top1"] == top1
            assert row["top1_se"] == pytest.approx(np.sqrt(top1 * (1 - top1) / 31))
            assert row["balanced"] == pytest.approx(balanced_accuracy_score(truth, predicted))
            assert row["is_default"] == ((k, temperature) == (20, 0.07))
    assert found.facts["num_images"] == {"train": 48, "test": 31}
    assert found.facts["bad_images"] == {"train": 0, "test": 1}
    about = "31 test images, classified by 48 training images. Report the row marked *"
    assert found.notes[0].startswith(about)
    assert "| 20 * |" in found.markdown()


def test_without_test_each_image_is_left_out_and_the_fixed_setting_is_named(run):
    found = run("knn", train="toy-0", k=(1,), baselines=False)
    assert found.facts["num_images"] == {"train": 48, "test": 48}
    (note,) = found.notes
    assert "48 training images, each classified by the others" in note
    assert "The setting fixed beforehand, k 20, temperature 0.07, is not among these" in note


def test_other_images_under_the_same_names_are_another_result(run, tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "data" / name, 3, broken=1)
    settings = {"train": str(tmp_path / "data"), "out": str(tmp_path / "out"), "k": (1,), "baselines": False}
    assert run("knn", **settings).facts["num_images"]["train"] == 6
    shutil.copy(tmp_path / "data/cat/0001.png", tmp_path / "data/dog/0000.png")
    with pytest.raises(UsageError, match=r"holds another result \(sources\.train\.sample"):
        run("knn", **settings)


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


def test_shots_are_images_of_every_class_or_a_share_of_each():
    source = ToySource(96)  # four classes of 24
    for text, images in (("3", 3), ("25%", 6)):
        drawn, again, other = (draw_shots(source, Shots.parse(text), seed) for seed in (0, 0, 1))
        assert np.bincount(source.labels[drawn]).tolist() == [images] * 4
        assert np.array_equal(drawn, again)
        assert not np.array_equal(drawn, other)


def test_several_shots_may_be_one_list_as_the_help_shows_it():
    assert FewshotSettings(model="x", train="a", test="b", shots=("1,5", "10%")).shots == ("1", "5", "10%")


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-1", "1.5", "all", "", "%"])
def test_what_is_no_number_of_labels_is_refused(text):
    with pytest.raises(UsageError, match="write images of every class, such as 5, or a share"):
        Shots.parse(text)


def test_numbers_are_means_over_draws(run):
    run.sources |= {"toy-0": ToySource(48, shuffled=True), "toy-1": ToySource(40, seed=1)}
    found = run("fewshot", train="toy-0", test="toy-1", shots=("2", "25%"), draws=3, baselines=False)
    (features, labels), (queries, truth) = (encoded(run.sources[name]) for name in ("toy-0", "toy-1"))
    top1 = []
    for number in range(3):
        drawn = draw_shots(run.sources["toy-0"], Shots.parse("2"), keyed_seed(0, "few-shot draw", number))
        folds_seed = keyed_seed(0, "folds", number) % 2**32
        fit = regress(features[drawn].double().numpy(), labels[drawn], 5, folds_seed)
        top1.append((fit.predict(queries.double().numpy()) == truth).mean())
    row = found.row(shots="2")
    assert row["draws"] == top1
    assert row["top1"] == statistics.fmean(top1)
    assert row["top1_std"] == statistics.stdev(top1) > 0
    assert row["top1_se"] == pytest.approx(statistics.stdev(top1) / 3**0.5)
    assert (row["train_images"], found.row(shots="25%")["train_images"]) == (8, 12)
    assert "mean of 3 draws ± its standard error, on 40 test images" in found.notes[0]


def test_baselines_learn_from_the_same_few_images_and_no_others_are_encoded(run, monkeypatch):
    monkeypatch.setattr(splits, "shared_images", lambda *_: None)  # which reads images as well
    found = run("fewshot", train="toy-0", test="toy-1", shots=("1", "13"), draws=1)
    assert [row["encoder"] for row in found.rows] == [MODEL, *BASELINES]
    assert run.sources["toy-0"].reads == 4 * 4
    assert all("lead" in row for row in found.rows[1:])
    row = found.rows[0]
    assert (row["shots"], row["top1_se"], row["top1_std"], row["c"]) == ("1", None, None, [DEFAULT_C])
    assert "one draw" in found.notes[0]
    assert "; if a class has only one, C is 1." in found.notes[0]
    assert "Labels 13 not measured: 'toy-0' has classes of fewer than 13 images" in found.notes[-1]


def test_the_paired_error_is_that_of_a_bootstrap_and_smaller_than_of_two_independent_accuracies():
    rng = np.random.default_rng(0)
    one = rng.random(400) < 0.7
    other = np.where(rng.random(400) < 0.9, one, ~one)  # errs mostly on the same images
    lead, error = paired(one, other)
    assert lead == pytest.approx(one.mean() - other.mean())
    draws = rng.integers(0, 400, (4000, 400))
    assert error == pytest.approx((one[draws].mean(1) - other[draws].mean(1)).std(), rel=0.05)
    assert error < 0.6 * np.sqrt(one.var() / 400 + other.var() / 400)
    assert paired(np.array([True]), np.array([False])) == (1, 1), "one image proves nothing"


def test_leads_compare_equal_settings_and_baselines_that_are_as_good_are_named():
    right = {MODEL: [1, 1, 1, 1, 0, 1, 1, 1], "untrained": [1, 1, 1, 1, 0, 1, 1, 0], "pixels 16x16": [0] * 8}
    rows = [{"encoder": name, "k": k} for name in right for k in (1, 2)]
    rights = [np.array(right[row["encoder"]], dtype=bool) ^ (row["k"] == 2) for row in rows]
    (note,) = add_leads(rows, rights, match=("k",))
    assert "lead" not in rows[0]
    assert [row["lead"] for row in rows[2:]] == [1 / 8, -1 / 8, 7 / 8, -7 / 8]
    assert rows[2]["lead_se"] == pytest.approx(1 / 8)  # one difference of eight: the deviation is sqrt(1 / 8)
    assert "not clearly better than untrained (+12.5 ± 12.5 points)" in note
    assert "pixels" not in note
    assert add_leads(rows[:1] + rows[4:5], [rights[0], rights[4]], match=("k",)) == []
    (note,) = add_leads([{**row, "is_default": row["k"] == 2} for row in rows], rights, match=("k",))
    assert "untrained (-12.5 ± 12.5 points) or pixels 16x16 (-87.5" in note
    assert add_leads(rows[::2], [np.ones(8, dtype=bool)] * 3, match=("k",)) == [SATURATED]


@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("knn", {"k": (0,)}, "k"),
        ("knn", {"k": ()}, "k is empty; name at least one"),
        ("knn", {"temperature": (1.0, 1.0)}, "temperature is 1.0, 1.0; name at least one, each once"),
        ("knn", {"layers": "best"}, "layers is 'best'; use last, last6"),
        ("knn", {"train": "one"}, "one has one readable image, so it has no neighbour; give --test"),
        ("fewshot", {"shots": ("13",)}, r"\(--shots 12\)"),
        ("fewshot", {"shots": ("2%",)}, "2% of toy-0 leaves 3 of its 4 classes without an image"),
        ("fewshot", {"shots": ("0.1%",)}, "no image of 'toy-0' is left for 0.1%; give larger shares"),
        (
            "fewshot",
            {"train": "some"},
            r"of 1 of its 4 classes \(d\); use images of every class$",
        ),
        ("fewshot", {"train": "some", "shots": ("50%",)}, "no image of 1 of its 4 classes"),
        ("fewshot", {"train": "holes"}, r"labels 1: no drawn image of 1 class of holes is readable \(b\)"),
    ],
)
def test_settings_that_cannot_be_and_too_few_images_are_refused(run, verb, changes, message):
    run.sources |= {"one": ToySource(2, bad={0}), "holes": ToySource(8, bad={1, 5}), "some": ToySource(8)}
    run.sources["some"].toy_labels = np.arange(8) % 3
    usual = {"knn": {}, "fewshot": {"test": "toy-1", "shots": ("1",), "draws": 1, "baselines": False}}
    with pytest.raises(UsageError, match=message):
        run(verb, **{"train": "toy-0", **usual[verb], **changes})
