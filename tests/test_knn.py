"""kNN: against loops over all pairs and scikit-learn, limits, and as a command."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from nextblock.evaluate.frozen import Opened, feature_config
from nextblock.evaluate.knn_config import KnnConfig
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.data import Source
from nextblock.evaluate.features import collect_features, encoder_extract, iterate_features
from nextblock.evaluate.knn import (
    comparison,
    knn,
    knn_opened,
    knn_predict,
    nearest_neighbours,
    summary,
)
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CPU = torch.device("cpu")


def test_prediction_is_the_class_with_the_most_weight_among_the_nearest():
    generator = torch.Generator().manual_seed(0)
    queries, neighbours = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    labels = torch.randint(0, 3, (50,), generator=generator)
    predicted = knn_predict(queries, neighbours, labels, 3, k=7, temperature=0.5)
    for query, answer in zip(queries, predicted, strict=True):
        similarity = [float(query @ one / query.norm() / one.norm()) for one in neighbours]
        votes = np.zeros(3)
        for row in sorted(range(50), key=lambda row: -similarity[row])[:7]:
            votes[labels[row]] += np.exp(similarity[row] / 0.5)
        assert answer == votes.argmax()


def test_a_neighbour_that_is_the_query_decides_at_k_1():
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 4
    assert torch.equal(knn_predict(features, features, labels, 4, k=1), labels)


def test_with_all_neighbours_at_high_temperature_the_commonest_class_wins():
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 2, 2, 2])
    assert knn_predict(features, features, labels, 3, k=100, temperature=1e6).tolist() == [1] * 9


def test_a_low_temperature_does_not_overflow():
    features = torch.eye(4)
    assert knn_predict(features, features, torch.arange(4), 4, temperature=1e-4).tolist() == [0, 1, 2, 3]


def some_vectors(count, seed=0, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_the_nearest_do_not_hang_on_how_many_are_compared_at_a_time(chunk):
    queries, neighbours = some_vectors(9), F.normalize(some_vectors(50, seed=1), dim=-1)
    found = nearest_neighbours(queries, neighbours, 12, chunk=chunk)
    similarity = F.normalize(queries, dim=-1) @ neighbours.T
    assert torch.equal(found.rows, similarity.argsort(dim=-1, descending=True)[:, :12])
    torch.testing.assert_close(found.similarity, similarity.sort(dim=-1, descending=True).values[:, :12])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_query_among_the_neighbours_does_not_find_itself(chunk):
    vectors = F.normalize(some_vectors(20), dim=-1)
    rows = torch.tensor([3, 19, 0])
    found = nearest_neighbours(vectors[rows], vectors, 100, itself=rows, chunk=chunk)
    assert found.rows.shape == (3, 19)
    for row, others in zip(rows.tolist(), found.rows.tolist(), strict=True):
        assert sorted([row, *others]) == list(range(20))


# ----------------------------------------------------------------------------------------- the evaluation


def opened(model=None, val=True, **changes):
    sources: dict[str, Source] = {
        "train": ToySource(60, **changes),
        **({"val": ToySource(40, seed=1)} if val else {}),
    }
    return Opened(model or toy_model(), DATA, sources)


def settings(**changes):
    return KnnConfig(model="toy", train="toy-0", device="cpu", encode_batch_size=20, **changes)


def features_of(source, extract):
    batches = iterate_features(extract, source, DATA, 16, batch_size=20, device=CPU)
    return collect_features(batches).features[0]


def test_every_k_and_temperature_is_what_it_is_alone():
    config = settings(k=(1, 3, 20), temperature=(0.07, 1.0))
    found = knn_opened(opened(), config)
    assert len(found.rows) == 3 * 3 * 2
    extract = encoder_extract(toy_model(), [feature_config(config, toy_model().config)])
    known, asked = features_of(ToySource(60), extract), features_of(ToySource(40, seed=1), extract)
    labels, truth = torch.from_numpy(ToySource(60).labels), torch.from_numpy(ToySource(40, seed=1).labels)
    for k in config.k:
        for temperature in config.temperature:
            predicted = knn_predict(asked, known, labels, 4, k=k, temperature=temperature)
            row = found.row("trained", k, temperature)
            assert row.top1 == accuracy_score(truth, predicted)
            assert row.balanced == pytest.approx(balanced_accuracy_score(truth, predicted))
            assert row.is_default == ((k, temperature) == (20, 0.07))
    assert found.row("trained", 20) is found.row("trained", 20, 0.07)


def test_at_high_temperature_it_is_scikit_learns_plain_vote():
    shuffled = opened(shuffled=True)  # so that votes differ
    found = knn_opened(shuffled, settings(k=(1, 5, 9), temperature=(1e6,)))
    pixels = [pixels_of(source) for source in shuffled.sources.values()]
    for k in (1, 5, 9):
        plain = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
        plain.fit(pixels[0], shuffled.sources["train"].labels)
        votes = np.asarray(plain.predict_proba(pixels[1]))
        is_clear = (votes == votes.max(axis=1, keepdims=True)).sum(axis=1) == 1  # else the nearer one decides
        truth = shuffled.sources["val"].labels
        right = (votes.argmax(axis=1) == truth)[is_clear].sum()
        top1 = found.row("raw pixels", k, 1e6).top1
        assert right / 40 <= top1 <= (right + (~is_clear).sum()) / 40


def pixels_of(source):
    return features_of(source, lambda images: (images.flatten(1),)).numpy()


def test_without_val_each_image_is_told_by_all_others(monkeypatch):
    monkeypatch.setattr("nextblock.evaluate.knn.QUERIES", 7)
    given = opened(val=False, shuffled=True)
    found = knn_opened(given, settings(k=(1, 4)))
    assert (found.split, found.train_images, found.measured_images) == ("leave-one-out", 60, 60)
    assert "60 images of train, each by its nearest among the other 59 (leave-one-out)" in summary(found)
    source = given.sources["train"]
    pixels, labels = torch.from_numpy(pixels_of(source)), torch.from_numpy(source.labels)
    for k in (1, 4):
        right = 0
        for row in range(60):
            others = [other for other in range(60) if other != row]
            told = knn_predict(pixels[row : row + 1], pixels[others], labels[others], 4, k=k)
            right += int(told == labels[row])
        assert found.row("raw pixels", k).top1 == right / 60
    assert found.row("raw pixels", 1).top1 < 0.6  # an image would be right of itself


def test_a_trained_encoder_stands_beside_the_two_baselines_unless_unasked():
    blind = toy_model()
    with torch.no_grad():
        blind.encoder.patch_embed.proj.weight.zero_()
    found = knn_opened(opened(blind), settings())
    assert list(dict.fromkeys(row.encoder for row in found.rows)) == ["trained", "untrained", "raw pixels"]
    assert found.row("trained", 1).top1 < 0.5 < 0.9 < found.row("untrained", 1).top1
    alone = knn_opened(opened(), settings(baselines=False))
    assert {row.encoder for row in alone.rows} == {"trained"}
    head, lines = comparison(found)
    assert head == ["k", "temperature", "trained", "untrained", "raw pixels"]
    assert [line[0] for line in lines] == ["1", "5", "20 *", "100"]


def test_raw_pixels_that_take_too_much_memory_are_left_out_and_it_is_said(caplog):
    with caplog.at_level("INFO"):
        found = knn_opened(opened(), settings(pixels_gb=1e-4))
    assert {row.encoder for row in found.rows} == {"trained", "untrained"}
    assert "raw pixels are left out: those of 100 images take 0.0 GB" in caplog.text


def test_unreadable_images_are_counted_by_source():
    given = opened(bad={0, 5})
    found = knn_opened(given, settings())
    assert dict(found.bad_images) == {"train": 2, "val": 0}
    assert (found.train_images, found.measured_images) == (58, 40)
    assert "For k 100 all 58 vote." in summary(found)


def test_the_summary_crowns_no_best_and_names_the_setting_fixed_beforehand():
    text = summary(knn_opened(opened(), settings()))
    assert "40 images of val, by their nearest among 60 of train" in text
    assert (
        "The row marked * (k 20, temperature 0.07) is the setting fixed beforehand: report that one" in text
    )
    without = summary(knn_opened(opened(), settings(k=(1, 3))))
    assert "k 20, temperature 0.07, is not among these" in without


def test_a_single_row_is_not_said_to_be_chosen():
    assert "so the best of them is chosen" in summary(knn_opened(opened(), settings(k=(1, 20))))
    alone = summary(knn_opened(opened(), settings(k=(20,), temperature=(0.07,))))
    assert "The row marked *" in alone
    assert "best of them" not in alone


def test_the_images_of_train_as_val_are_warned_of_and_the_way_out_is_named(tmp_path, caplog):
    save_model(tmp_path / "model.safetensors", toy_model())
    model, digits = str(tmp_path / "model.safetensors"), "digits:split=test"
    knn(KnnConfig(model=model, train=digits, val=digits, baselines=False, device="cpu"))
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert warning.getMessage() == (
        f"val {digits} is the same images as train: accuracy on them says nothing of new images; leave out "
        "--val to compare each image of train with the others"
    )


def test_layers_are_named_as_for_a_probe():
    config = toy_model().config
    assert feature_config(settings(), config).layers == (1,)
    assert feature_config(settings(layers="last2"), config).layers == (0, 1)
    assert feature_config(settings(layers="layer0"), config).layers == (0,)
    assert feature_config(settings(layers="0+1"), config).layers == (0, 1)
    with pytest.raises(
        ValueError, match="layers is layer2, but the encoder has 2 layers; name each once, among 0"
    ):
        feature_config(settings(layers="layer2"), config)
    assert feature_config(settings(layers="last3"), config).layers == (0, 1)


def test_the_default_features_are_those_of_the_monitor():
    model, source = toy_model(), ToySource(12)
    wanted = feature_config(settings(), model.config)
    found = features_of(source, encoder_extract(model, [wanted]))
    expected = features_of(source, lambda images: (model.encode(images).tokens.mean(dim=1),))
    torch.testing.assert_close(found, expected)


def test_features_that_are_no_numbers_are_refused():
    model = toy_model()
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"features of \d+ of \d+ images are no numbers, .* encode with"):
        knn_opened(opened(model), settings())


def test_the_command_writes_its_table_and_refuses_another_in_its_place(tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", toy_model())
    words = ["knn", "--model", str(tmp_path / "model.safetensors"), "--train", "digits:split=test"]
    words += ["--k=1", "--k=20", "--temperature=0.07", "--baselines=false", "--device=cpu"]
    words += ["--out", str(tmp_path / "out")]
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr().out
    result = json.loads(told.splitlines()[-1])
    written = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert written["rows"] == result["rows"]
    assert written["settings"]["k"] == [1, 20]
    assert [row["k"] for row in result["rows"]] == [1, 20]
    with (tmp_path / "out" / "knn.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["top1"]) for line in lines] == [row["top1"] for row in result["rows"]]
    text = (tmp_path / "out" / "knn.md").read_text()
    assert "| 20 * | 0.07 | " in text
    assert "leave-one-out" in " ".join(told.split())
    assert "Train digits:split=test. 360 images" in text

    assert main([*words, "--k", "3"]) == 2
    assert "holds another result (settings.k: [1, 20] there, [1, 20, 3] here" in capsys.readouterr().err
    assert main(words) == 0  # the same one is measured anew
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(words) == 2
    assert main([*words, "--k", "3", "--overwrite"]) == 2
    assert capsys.readouterr().err.count("holds other files (notes.txt)") == 2
    (tmp_path / "out" / "notes.txt").unlink()
    assert main([*words, "--k", "3", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "knn.json").read_text())["settings"]["k"] == [1, 20, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (0,)}, r"k is \[0\]; give one or more numbers from 1 on, each once"),
        ({"k": ()}, r"k is \[\]; give one or more numbers from 1 on"),
        ({"k": (5, 5)}, r"k is \[5, 5\]; .* each once"),
        ({"temperature": (0.0,)}, r"temperature is \[0.0\]; give one or more numbers above 0"),
        ({"layers": "best"}, "layers is 'best'; use last, last6"),
        ({"layers": "top"}, "layers is 'top'; use last"),
        ({"encode_batch_size": 0}, "encode_batch_size is 0; use at least 1"),
        ({"pixels_gb": -1.0}, "pixels_gb is -1.0; it cannot be below 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        KnnConfig(model="toy", train="toy-0", **changes)


def test_a_single_image_is_not_left_out():
    alone = Opened(toy_model(), DATA, {"train": ToySource(1)})
    with pytest.raises(
        ValueError, match="toy-0 has one readable image: left out, none is near it; give --val"
    ):
        knn_opened(alone, settings())
