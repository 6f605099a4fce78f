"""kNN: against loops over all pairs and scikit-learn, its limits, and its leads over the baselines."""

import json
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import ranks
from evaluating import toy_table, toy_verb, written  # noqa: F401 - a fixture
from nextblock.cli import main
from nextblock.errors import UsageError
from nextblock.evaluate.features import small_pixels_extract
from nextblock.evaluate.knn import nearest_neighbours, predict_all
from nextblock.evaluate.metrics import paired
from nextblock.evaluate.results import BASELINES, MODEL, SATURATED, add_leads
from toy import ToySource, one_thread  # noqa: F401 - a fixture

CPU = torch.device("cpu")


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
    for queries, most, itself in ((some_vectors(9), 12, None), (neighbours[rows], 49, rows)):
        similarity = F.normalize(queries, dim=-1) @ neighbours.T
        if itself is not None:
            similarity[range(3), itself] = -np.inf
        best = similarity.sort(dim=-1, descending=True)
        found = nearest_neighbours(
            queries, neighbours, 12 if itself is None else 100, itself=itself, chunk=chunk
        )
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
        known, asked = (toy_table(run.sources[name], extract) for name in ("toy-0", "toy-1"))
        known.fill()
        asked.fill()
        chosen = asked.readable()
        truth = run.sources["toy-1"].labels[chosen]
        labels = torch.from_numpy(run.sources["toy-0"].labels)
        for k, temperature in product((1, 3, 20), (0.07, 1.0)):
            given = (asked.read(chosen), known.read(known.readable()), labels, 4)
            predicted = knn_predict(*given, k=k, temperature=temperature).numpy()
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


def test_without_test_each_image_is_left_out_and_the_fixed_setting_is_named(run):
    found = run("knn", train="toy-0", k=(1,), baselines=False)
    assert found.facts["num_images"] == {"train": 48, "test": 48}
    (note,) = found.notes
    assert "48 training images, each classified by the others" in note
    assert "The setting fixed beforehand, k 20, temperature 0.07, is not among these" in note


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
    ("changes", "message"),
    [
        ({"k": (0,)}, "k"),
        ({"k": ()}, "k is empty; name at least one"),
        ({"temperature": (1.0, 1.0)}, "temperature is 1.0, 1.0; name at least one, each once"),
        ({"layers": "best"}, "layers is 'best'; use last, last6"),
        ({"train": "single"}, "single has one readable image, so it has no neighbour; give --test"),
    ],
)
def test_settings_that_cannot_be_and_a_single_image_are_refused(run, changes, message):
    run.sources["single"] = ToySource(2, bad={0})
    with pytest.raises(UsageError, match=message):
        run("knn", **{"train": "toy-0", **changes})


def test_the_command_prints_a_table_and_finds_the_same_on_two_processes(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(7):
            image = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            image[..., number] += 40
            Image.fromarray(image).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "cat" / "broken.png").write_bytes(b"no picture")
    words = ["knn", "--model", str(tmp_path / "model.safetensors"), "--train", str(tmp_path / "data")]
    words += ["--k", "1", "--k", "20", "--device", "cpu", "--workers", "0", "--max_bad_fraction", "0.1"]
    assert main([*words, "--out", str(tmp_path / "one"), "--json"]) == 0
    printed = capsys.readouterr().out
    assert "top-1 %" in printed
    assert "20 *" in printed
    assert json.loads(printed.splitlines()[-1])["rows"] == written(tmp_path / "one" / "knn.json")["rows"]
    assert ranks.run_ranks(2, main, [*words, "--out", str(tmp_path / "two")]) == [0, 0]
    one, two = (written(tmp_path / name / "knn.json") for name in ("one", "two"))
    assert one == two
    assert one["bad_images"] == {"train": 1}
    files = {path.name for path in (tmp_path / "two").iterdir() if path.name[0] != "."}
    assert files == {"knn.csv", "knn.json", "knn.md", "quarantine.jsonl", "right.npz"}
