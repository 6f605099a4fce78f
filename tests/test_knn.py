"""kNN: against loops over all pairs, limits, and as a monitor of a model that changes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nextblock.evaluate.knn import KnnMonitor, knn_accuracy, knn_predict
from nextblock.train.monitor import MonitorEvent
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CPU = torch.device("cpu")
EVENT = MonitorEvent(step=0, run_dir=Path(), device=CPU)


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


def test_colours_are_told_apart_and_shuffled_labels_are_not():
    model, known = toy_model(), ToySource(96)
    found = knn_accuracy(model, known, ToySource(48, seed=1), DATA, device=CPU, batch_size=20)
    assert found["top1"] > 0.95
    assert (found["train_images"], found["val_images"], found["bad"]) == (96, 48, 0)
    shuffled = ToySource(200, shuffled=True)
    assert knn_accuracy(model, shuffled, ToySource(100, seed=1), DATA, device=CPU)["top1"] < 0.45


def test_at_most_so_many_images_are_read_chosen_by_the_seed():
    model, accuracies = toy_model(), set()
    for seed in (0, 0, 1, 2):
        known, asked = ToySource(96, shuffled=True), ToySource(96, seed=1)
        found = knn_accuracy(model, known, asked, DATA, k=1, max_samples=30, seed=seed, device=CPU)
        assert (known.reads, asked.reads) == (30, 30)
        accuracies.add((seed, found["top1"]))
    assert len({seed for seed, _ in accuracies}) == 3
    assert len(accuracies) == 3
    assert len({accuracy for _, accuracy in accuracies}) > 1


def test_unreadable_images_are_left_out_and_counted():
    known, asked = ToySource(96, bad={0, 1}), ToySource(48, seed=1, bad={3})
    found = knn_accuracy(toy_model(), known, asked, DATA, device=CPU)
    assert (found["train_images"], found["val_images"], found["bad"]) == (94, 47, 3)
    assert found["top1"] > 0.95


def test_the_monitor_looks_at_the_model_as_it_is_now():
    model = toy_model()
    monitor = KnnMonitor(ToySource(96), ToySource(48, seed=1), DATA, image_size=16, every="5ep")
    assert monitor.every == "5ep"
    with torch.no_grad():
        before = monitor(model, EVENT)
        state = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.encoder.patch_embed.proj.weight.zero_()
        blind = monitor(model, EVENT)
        model.load_state_dict(state)
        assert monitor(model, EVENT) == before
    assert before.keys() == {"knn/top1"}
    assert before["knn/top1"] > 0.95
    assert blind["knn/top1"] < 0.5


def test_the_monitor_draws_no_random_number():
    monitor = KnnMonitor(ToySource(24), ToySource(24, seed=1), DATA, image_size=16, every="5ep")
    before = torch.random.get_rng_state()
    with torch.no_grad():
        monitor(toy_model(), EVENT)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_impossible_settings_are_refused():
    sources = ToySource(8), ToySource(8, seed=1)
    with pytest.raises(ValueError, match="k is 0"):
        knn_accuracy(toy_model(), *sources, DATA, k=0, device=CPU)
    with pytest.raises(ValueError, match="'often' is not a duration"):
        KnnMonitor(*sources, DATA, image_size=16, every="often")
    with pytest.raises(ValueError, match="do not have the same classes"):
        KnnMonitor(sources[0], ToySource(8, class_names=("a", "b")), DATA, image_size=16, every="5ep")
