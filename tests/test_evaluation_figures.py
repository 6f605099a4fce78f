"""Pictures of evaluations: which are drawn, and what is in them."""

from itertools import product

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from nextblock.visualize import evaluation
from nextblock.visualize.evaluation import draw_attention, draw_confusion, draw_grid

RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def candidates(head, encoder="model", *, layers=((5,),), rates=RATES, peak=0.8, **changes):
    """Heads whose accuracy is a hill over learning rate and layer; the highest one wins."""
    rows = [
        {
            "encoder": encoder,
            "head": head,
            "lr": lr,
            "weight_decay": 0.1,
            "layers": list(chosen),
            "attention": "native",
            "tokens": "patches",
            "top1": float(peak - 0.08 * abs(np.log10(lr) + 3) - 0.02 * abs(np.mean(chosen or (0,)) - 4)),
            "is_winner": False,
            "is_diverged": False,
            **changes,
        }
        for chosen, lr in product(layers, rates)
    ]
    max(rows, key=lambda row: row["top1"])["is_winner"] = changes.get("is_winner", True)
    return rows


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by file name."""
    saved, original = {}, evaluation.save_png

    def save(figure, path, **options):
        saved[path.name] = figure
        original(figure, path, **options)

    monkeypatch.setattr(evaluation, "save_png", save)
    return saved


@pytest.fixture
def drawn(tmp_path, figures):
    """Draw a grid; its panels."""

    def draw(grid):
        assert draw_grid(grid, "choice", tmp_path / "probe.png")
        with Image.open(tmp_path / "probe.png") as picture:
            assert picture.size[1] == 800
        return figures["probe.png"].axes

    return draw


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes, label):
    return next(one for one in axes.lines if str(one.get_label()).startswith(label))


def test_learning_rates_make_a_line_for_each_head_with_its_winner_marked(drawn):
    grid = candidates("attentive") + candidates("linear", peak=0.7)
    (axes,) = drawn(grid)
    assert axes.get_xscale() == "log"
    assert legend(axes) == ["attentive: 78.0", "linear: 68.0"]
    rates, shares = line(axes, "linear").get_data()
    assert tuple(rates) == RATES
    assert list(shares) == pytest.approx([100 * row["top1"] for row in grid if row["head"] == "linear"])
    assert [one.get_xdata()[0] for one in axes.lines if one.get_marker() == "*"] == [1e-3, 1e-3]
    assert axes.get_ylabel() == "top-1 (%) on images held out of train"


def test_layers_get_a_panel_of_their_own_and_several_together_a_bar(drawn):
    layers = (*((layer,) for layer in range(6)), (3, 4, 5))
    by_rate, by_layer = drawn(candidates("linear", layers=layers))
    layer, shares = line(by_layer, "linear").get_data()
    assert list(layer) == [0, 1, 2, 3, 4, 5]
    assert list(shares) == pytest.approx([100 * (0.8 - 0.02 * abs(one - 4)) for one in range(6)])
    assert list(line(by_layer, "linear, mean of several").get_xdata()) == [3, 5]
    assert "linear, layers 4: 80.0" in legend(by_rate)
    assert "linear, layers 3-5" in legend(by_rate)


def test_a_legend_names_of_many_lines_only_the_winner_and_only_what_varies(drawn):
    (axes, _) = drawn(candidates("linear", layers=[(layer,) for layer in range(12)]))
    assert legend(axes) == ["linear, layers 4: 80.0"]
    other = candidates("linear", attention="full", peak=0.7, is_winner=False)
    (axes,) = drawn(candidates("linear") + other)
    assert legend(axes) == ["linear, attention native: 78.0", "linear, attention full"]


def test_layers_alone_make_one_panel(drawn):
    (axes,) = drawn(candidates("linear", layers=((0,), (1,)), rates=(1e-3,)))
    assert axes.get_xlabel().startswith("layer of the encoder")


def test_baselines_stand_beside_and_diverged_heads_leave_a_gap(drawn):
    grid = candidates("linear") + candidates("linear", "untrained", peak=0.5)
    grid += candidates("linear", "pixels 16x16", peak=0.4, layers=((),), attention=None, tokens=None)
    grid[3] |= {"top1": None, "is_diverged": True}
    (axes,) = drawn(grid)
    named = ["linear: 78.0", "untrained, linear: 48.0", "pixels 16x16, linear: 32.0", "some diverged"]
    assert legend(axes) == named
    assert np.isnan(line(axes, "linear").get_ydata()[3])
    assert list(line(axes, "some diverged").get_xdata()) == [RATES[3]]


def test_nothing_is_drawn_if_there_was_nothing_to_choose(tmp_path):
    assert not draw_grid(candidates("linear", rates=(1e-3,), top1=None), None, tmp_path / "probe.png")
    assert list(tmp_path.iterdir()) == []


def test_a_confusion_matrix_has_shares_as_colours_and_counts_as_numbers(tmp_path, figures):
    counts, names = [[3, 1, 0], [0, 4, 0], [0, 0, 0]], ("cat", "$x^", "eel")
    draw_confusion(counts, names, "linear: 87.5%", tmp_path / "c.png")
    axes = figures["c.png"].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array()[:2], [[75, 25, 0], [0, 100, 0]])
    assert np.ma.getmaskarray(axes.images[0].get_array())[2].all()  # no image of that class
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "3", (1, 0): "1", (1, 1): "4"}  # (predicted, true)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "$x^", "eel"]
    assert "linear: 87.5%, 3 classes, 8 images" in axes.get_title(loc="left").replace("\n", " ")


@pytest.mark.usefixtures("coarse_pictures")
@pytest.mark.parametrize(("classes", "is_labelled"), [(40, True), (41, False)])
def test_up_to_40_classes_are_named(tmp_path, figures, classes, is_labelled):
    names = [f"a class with quite a long name {number}" for number in range(classes)]
    draw_confusion(np.eye(classes, dtype=int).tolist(), names, "head", tmp_path / "c.png")
    axes = figures["c.png"].axes[0]
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert bool(axes.texts) == ("a class with …ng name 12" in ticks) == is_labelled


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_maps_of_attention_have_one_scale_an_image_and_lie_over_its_grey(channels, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(evaluation, "draw_cells", lambda rows, _, **words: found.update(rows=rows, **words))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 16, channels), dtype=np.uint8)
    attention = np.zeros((2, 3, 2, 4), dtype=np.float32)
    attention[0, 1, 0, 3], attention[0, 2], attention[1] = 0.5, 0.25, 0.125
    draw_attention(images, attention, tmp_path / "a.png", names=["one.png", "two.png"])
    assert found["names"] == ["0 to\n50.0 %", "0 to\n12.5 %"]
    row, shown = found["rows"][0], images[0, ..., : 3 if channels >= 3 else 1]
    assert [cell.words for cell in row] == ["one.png", "mean of 3", "query 0", "query 1", "query 2"]
    np.testing.assert_array_equal(row[0].picture, shown)
    colours, grey = colormaps["inferno"], shown.mean(-1) / 255
    places = ((3, 0, 12, 1.0), (3, 3, 15, 1.0), (3, 4, 15, 0.0), (3, 3, 11, 0.0), (4, 7, 0, 0.5))
    for cell, line, column, share in places:
        expected = 0.9 * np.array(colours(share)[:3]) + 0.1 * grey[line, column]
        np.testing.assert_allclose(row[cell].picture[line, column], expected, atol=1e-6)
