"""Pictures of a probe: which are drawn, what stands in them, and that they are pictures."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextblock.evaluate.probe.config import ProbeCandidate, ProbeResult, ProbeRow
from nextblock.visualize import evaluation
from nextblock.visualize.evaluation import draw_probe

RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def candidates(
    head: Any,
    encoder: Any = "trained",
    *,
    layers=((5,),),
    rates=RATES,
    peak=0.8,
    chosen_on: Any = "choice",
    **changes,
):
    """Heads whose accuracy is a hill over learning rate and layer; the highest one wins."""
    found = []
    for chosen, lr in product(layers, rates):
        top1 = peak - 0.08 * abs(np.log10(lr) + 3) - 0.02 * abs(np.mean(chosen or (0,)) - 4)
        found.append((chosen, lr, None if chosen_on is None else float(top1)))
    best = max(range(len(found)), key=lambda number: found[number][2] or 0)
    return [
        ProbeCandidate(
            encoder=encoder,
            head=head,
            lr=lr,
            weight_decay=0.1,
            layers=chosen,
            **{"attention": "native", "tokens": "patches", **changes},
            chosen_on=chosen_on,
            top1=top1,
            top5=top1,
            loss=None if top1 is None else 1 - top1,
            winner=number == best,
            diverged=False,
        )
        for number, (chosen, lr, top1) in enumerate(found)
    ]


def probe_row(head: Any, confusion, encoder: Any = "trained", split: Any = "held-out"):
    counts = np.array(confusion if confusion is not None else [[1, 0], [0, 1]])
    per_class = [c / n if n else None for c, n in zip(counts.diagonal(), counts.sum(axis=1), strict=True)]
    return ProbeRow(
        encoder=encoder,
        head=head,
        split=split,
        top1=float(counts.trace() / counts.sum()),
        top5=1.0,
        images=int(counts.sum()),
        lr=1e-3,
        weight_decay=0.1,
        layers=(5,),
        attention="native",
        epochs=10,
        elapsed_s=1.0,
        tokens="patches",
        balanced=0.5,
        calibration_error=0.1,
        loss=0.5,
        per_class=tuple(None if value is None else float(value) for value in per_class),
        confusion=None if confusion is None else tuple(tuple(map(int, counted)) for counted in counts),
    )


def some_confusion(classes, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.5 if classes < 60 else 0.02, (classes, classes)) + np.diag(
        rng.poisson(20, classes)
    )
    counts[1] = 0  # a class without images
    return counts


def result(grid, rows, class_names=("cat", "dog")):
    return ProbeResult(
        rows=tuple(rows),
        grid=tuple(grid),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        train_images=100,
        split_images={"held-out": 10},
        bad_images={},
        resolved={},
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures, by the name of the file that each went to."""
    kept, save = {}, evaluation.save_png
    monkeypatch.setattr(
        evaluation,
        "save_png",
        lambda figure, path, **settings: (kept.update({path.name: figure}), save(figure, path, **settings)),
    )
    return kept


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes, label):
    return next(one for one in axes.lines if one.get_label() == label)


def test_learning_rates_make_a_line_for_each_head_with_its_winner_marked(tmp_path, figures):
    grid = candidates("attentive") + candidates("linear", peak=0.7)
    drawn = draw_probe(result(grid, [probe_row("attentive", None)]), tmp_path)
    assert drawn == [tmp_path / "probe.png"]
    with Image.open(drawn[0]) as picture:
        assert picture.size == (1056, 800)
    (axes,) = figures["probe.png"].axes
    assert axes.get_xscale() == "log"
    assert legend(axes) == ["attentive", "linear"]
    rates, shares = line(axes, "linear").get_data()
    assert tuple(rates) == RATES
    assert list(shares) == pytest.approx([100 * (one.top1 or 0) for one in grid if one.head == "linear"])
    assert [text.get_text() for text in axes.texts] == ["78.0", "68.0"]
    assert axes.get_ylabel() == "top-1 (%), held out of train"


def test_layers_get_a_panel_of_their_own_and_several_together_a_bar(tmp_path, figures):
    layers = (*((layer,) for layer in range(6)), (3, 4, 5))
    grid = candidates("linear", layers=layers)
    draw_probe(result(grid, []), tmp_path)
    by_rate, by_layer = figures["probe.png"].axes
    layer, shares = line(by_layer, "linear").get_data()
    assert list(layer) == [0, 1, 2, 3, 4, 5]
    assert list(shares) == pytest.approx([100 * (0.8 - 0.02 * abs(one - 4)) for one in range(6)])
    ends, _ = line(by_layer, "linear, mean of several").get_data()
    assert list(ends) == [3, 5]
    assert "linear, layer 4" in legend(by_rate)
    assert "linear, layers 3-5" in legend(by_rate)


def test_layers_alone_make_one_panel(tmp_path, figures):
    draw_probe(result(candidates("linear", layers=((0,), (1,)), rates=(1e-3,)), []), tmp_path)
    (axes,) = figures["probe.png"].axes
    assert axes.get_xlabel().startswith("layer of the encoder")


def test_of_many_lines_only_the_winner_is_named(tmp_path, figures):
    grid = candidates("linear", layers=tuple((layer,) for layer in range(12)))
    draw_probe(result(grid, []), tmp_path)
    assert legend(figures["probe.png"].axes[0]) == ["linear, layer 4"]


def test_only_what_varies_is_named(tmp_path, figures):
    grid = candidates("linear") + [
        one for one in candidates("linear", attention="full", peak=0.7) if not one.winner
    ]
    draw_probe(result(grid, []), tmp_path)
    assert legend(figures["probe.png"].axes[0]) == ["linear, attention native", "linear, attention full"]


def test_baselines_stand_beside_and_diverged_heads_leave_a_gap(tmp_path, figures):
    grid = candidates("linear") + candidates("linear", "untrained", peak=0.5)
    grid += candidates("linear", "raw pixels", peak=0.4, layers=((),), attention=None, tokens=None)
    grid[3] = replace(grid[3], top1=None, top5=None, loss=None, diverged=True)
    draw_probe(result(grid, []), tmp_path)
    (axes,) = figures["probe.png"].axes
    assert legend(axes) == ["linear", "untrained", "raw pixels", "some diverged"]
    assert np.isnan(line(axes, "linear").get_ydata()[3])
    assert list(line(axes, "some diverged").get_xdata()) == [RATES[3]]
    assert line(axes, "raw pixels").get_ydata().max() < 41


def test_nothing_is_drawn_where_there_was_nothing_to_choose_and_no_confusion(tmp_path):
    grid = candidates("linear", rates=(1e-3,), chosen_on=None)
    assert draw_probe(result(grid, [probe_row("linear", None)]), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_confusion_matrix_is_drawn_for_each_head_of_the_trained_encoder(tmp_path, figures):
    rows = [
        probe_row("attentive", [[3, 1], [0, 4]]),
        probe_row("linear", [[2, 2], [0, 0]], split="val"),
        probe_row("linear", [[4, 0], [0, 0]], split="test"),
        probe_row("linear", [[0, 1], [1, 0]], encoder="untrained"),
    ]
    drawn = draw_probe(result(candidates("linear", rates=(1e-3,), chosen_on=None), rows), tmp_path)
    assert [path.name for path in drawn] == ["confusion-attentive.png", "confusion-linear.png"]
    axes = figures["confusion-attentive.png"].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[75, 25], [0, 100]])
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "3", (1, 0): "1", (1, 1): "4"}  # (predicted, true)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog"]
    assert "attentive head on held-out: top-1 87.5%" in axes.get_title(loc="left")
    tested = figures["confusion-linear.png"].axes[0]
    assert "on test: top-1 100.0%" in tested.get_title(loc="left").replace("\n", " ")
    assert np.ma.getmaskarray(tested.images[0].get_array())[1].all()  # no image of that class


@pytest.mark.parametrize(("classes", "is_labelled"), [(40, True), (41, False)])
def test_up_to_40_classes_are_named(tmp_path, figures, classes, is_labelled):
    names = [f"a class with quite a long name {number}" for number in range(classes)]
    grid = candidates("linear", rates=(1e-3,), chosen_on=None)
    draw_probe(result(grid, [probe_row("linear", some_confusion(classes))], names), tmp_path)
    axes = figures["confusion-linear.png"].axes[0]
    assert bool(axes.texts) == is_labelled
    assert ("a class with …ng name 12" in [tick.get_text() for tick in axes.get_yticklabels()]) == is_labelled


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path):
    grid = candidates("linear", rates=(1e-3,), chosen_on=None)
    rows = [probe_row("linear", [[1, 0], [0, 1]])]
    assert draw_probe(result(grid, rows, ("$x^", "$\\frac$")), tmp_path) == [
        tmp_path / "confusion-linear.png"
    ]
