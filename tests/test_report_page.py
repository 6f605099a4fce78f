"""Several runs compared, and pages in a browser: names do no harm in them, and they work offline."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nextblock.report import Comparison, comparison_page, read_run, run_page
from nextblock.report import compare as comparing
from serving import browser_fixture, page_fixture  # noqa: F401
from test_report import probe_row, write_lines, write_result, write_run
from tiny_runs import call_cli

ODD = "</script><script>alert(1)</script>"
KNN = "kNN while training on digits:split=test"


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Three runs of falling loss and rising accuracy."""
    return [write_run(tmp_path / "runs" / f"run {i}", scale=3.0 - i, steps=40 + 10 * i) for i in range(3)]


def compared(*runs: Path) -> Comparison:
    return Comparison([read_run(run) for run in runs])


def drop_lines(run: Path, words: str) -> None:
    """Remove the lines of a run's metrics that contain some words."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if words not in line))


def test_correlations_are_those_of_numpy_and_equal_values_share_their_ranks():
    rng = np.random.default_rng(1)
    for _ in range(5):
        x, y = rng.integers(0, 5, 9).tolist(), rng.standard_normal(9).round(1).tolist()
        assert comparing.correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
        places = [np.flatnonzero(np.sort(x) == one).mean() + 1 for one in x]
        assert comparing.ranks(x) == places
    for x, y in (([1, 2], [2, 1]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([], [])):
        assert comparing.correlation(x, y) is None, "too few, or equal"


def test_runs_are_compared(runs):
    found = compared(*runs)
    assert found.names == ["run 0", "run 1", "run 2"]
    assert [row["images"] for row in found.rows] == [64 * 40, 64 * 50, 64 * 60]
    losses, accuracies = [1.1 * 3 / 40, 1.1 * 2 / 50, 1.1 / 60], [0.6, 0.7, 0.8]
    assert [row["val_loss"] for row in found.rows] == pytest.approx(losses)
    (relation,) = found.relations
    assert (relation.accuracy, relation.runs) == (KNN, 3)
    assert relation.pearson == pytest.approx(np.corrcoef(losses, accuracies)[0, 1])
    assert relation.spearman == pytest.approx(-1)
    assert (found.differing, found.unlike) == ({}, {})
    json.dumps(found.values(), allow_nan=False)


def test_the_measure_that_most_runs_have_comes_first_and_one_at_step_0_is_none(runs):
    for run in runs[:2]:
        write_result(run / "probe", "probe", [probe_row("linear", "model", 0.5)])
    first = {"kind": "monitor", "step": 0, "knn/top1": 0.1}
    write_lines(runs[0] / "metrics.jsonl", [first, {"kind": "val", "step": 1, "val_loss": 2}])
    write_lines(runs[1] / "metrics.jsonl", [])
    found = compared(*runs)
    measured = {name: [one is not None for one in values] for name, values in found.measures.items()}
    assert [*measured.items()] == [("linear on digits:split=test", [1, 1, 0]), (KNN, [0, 0, 1])]
    assert "no correlation of 1 run;" in found.relations[0].words


def test_runs_of_one_size_are_not_drawn_by_size(runs):
    weights = {"encoder.a": np.zeros(2, np.float32)}
    for number, run in enumerate(runs):
        (run / "checkpoints" / "step_00000060").mkdir(parents=True)
        more = {"encoder.b": np.zeros(1, np.float32)} if number == 2 else {}
        save_file(weights | more, run / "checkpoints" / "step_00000060" / "model.safetensors")
    drop_lines(runs[2], "knn/top1")  # the run of another size has no accuracy
    charts, _ = comparing._relation_charts(compared(*runs))
    titles = [chart["title"] for chart in charts]
    assert "Validation loss by encoder parameters" in titles
    assert "Accuracy by encoder parameters" not in titles


def test_losses_of_different_targets_are_not_taken_for_comparable(tmp_path):
    changes = ({}, {"model.block_size": 4}, {"optim.lr": 1.0})
    runs = [write_run(tmp_path / str(i), changes=one) for i, one in enumerate(changes)]
    found = compared(*runs)
    assert found.unlike == {"losses": ["model.block_size"]}
    assert found.differing == {"model.block_size": [2, 4, 2], "optim.lr": [2e-3, 2e-3, 1.0]}
    assert "The runs differ in model.block_size" in comparison_page(found)
    assert compared(runs[0], runs[2]).unlike == {}


def test_losses_on_other_images_are_not_compared_if_there_are_any(tmp_path):
    changes = ({}, {"data.val": None}, {"data.train": "A", "data.val": "B"})
    first, blind, other = (write_run(tmp_path / str(i), changes=one) for i, one in enumerate(changes))
    drop_lines(blind, "val_loss")
    assert compared(first, blind).unlike == {}
    assert comparing.comparison_table(compared(first, blind)).cells()[1][-3] == "-"
    both = {"training losses": ["data.train"], "validation losses": ["data.val"]}
    assert compared(first, other).unlike == both


def test_accuracies_on_other_images_or_from_other_labels_are_other_accuracies(tmp_path):
    knn = {"monitor.knn_every": "1ep", "monitor.knn_train": "A", "monitor.knn_val": "B"}
    runs = [write_run(tmp_path / str(i), changes=one, steps=40 + 10 * i) for i, one in enumerate(({}, knn))]
    for run, train in zip(runs, ("A", "TEN"), strict=True):
        write_result(run / "probe", "probe", [probe_row("linear", "model", 0.5)], train=train)
    found = compared(*runs)
    assert {name: [one is not None for one in values] for name, values in found.measures.items()} == {
        "linear on digits:split=test, labels from A": [True, False],
        "kNN while training on digits:split=test, labels from digits": [True, False],
        "linear on digits:split=test, labels from TEN": [False, True],
        "kNN while training on B, labels from A": [False, True],
    }
    titles = [chart["title"] for chart in comparing._curve_charts(found)]
    own = ["digits:split=test, labels from digits", "B, labels from A"]
    assert titles[2:4] == [f"kNN accuracy on {where}" for where in own]
    by_cost = [f"Validation loss by {cost}" for cost in ("model FLOPs", "images seen")]
    assert [chart["title"] for chart in comparing._relation_charts(found)[0]] == by_cost, "no lone points"


def test_report_of_several_runs_writes_one_page_beside_them_again_and_again(capsys, runs):
    assert call_cli(capsys, "report", *runs)[0] == 0
    folder = runs[0].parent
    code, out, _ = call_cli(capsys, "report", *sorted(folder.iterdir()), "--json")  # the page is among them
    values = json.loads(out.splitlines()[-1])
    assert (code, values["page"]) == (0, str(folder / "report.html"))
    assert [row["run"] for row in values["runs"]] == ["run 0", "run 1", "run 2"]
    assert f"validation loss and {KNN}: Pearson r -0.99" in out
    assert not (runs[0] / "report.html").exists()


@pytest.fixture
def opened(page, tmp_path):
    """`opened(html)` -> the page in a browser."""

    def open_(html: str):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        page.goto(f"file://{tmp_path / 'page.html'}")
        return page

    return open_


def check_layout(page) -> None:
    """No sideways scrolling, dark or light; headings go down one level at a time."""
    for width in (400, 1600):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert max(np.diff(levels)) == 1


def test_the_slider_changes_the_picture_and_charts_tell_their_values(opened, tmp_path):
    run = write_run(tmp_path / ("long name " * 10), pictures=3)
    rows = [probe_row("linear", name * 9, 0.5) for name in ("model", "untrained")]
    write_result(run / "probe", "probe", rows)
    page = opened(run_page(read_run(run)))
    check_layout(page)
    slider, picture = page.get_by_label("Step", exact=True), page.locator("#steps img")
    last = picture.get_attribute("src")
    assert (slider.input_value(), page.locator("#steps output").inner_text()) == ("2", "20")
    slider.press("ArrowLeft")
    assert page.locator("#steps output").inner_text() == "10"
    assert picture.get_attribute("src") != last
    assert "step 10" in picture.get_attribute("alt")
    chart = page.locator("#charts figure").first
    assert "training 0.01667" in chart.inner_text()
    for _ in range(6):
        chart.locator("svg").press("ArrowLeft")
    assert chart.locator("output").inner_text() == "training 0.1validation 0.11step 10"
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 15, box["y"] + 50)
    assert "step 60" in chart.locator("output").inner_text()


def test_more_than_ten_runs_differ_in_colour(opened, tmp_path):
    runs = [write_run(tmp_path / str(i), steps=20 + 10 * i) for i in range(11)]
    page = opened(comparison_page(compared(*runs)))
    for marks in ("#charts figure:first-child .curve", "#relations figure:first-child svg > circle"):
        look = "one.getAttribute('stroke') ?? one.getAttribute('fill')"
        looks = page.locator(marks).evaluate_all(f"all => all.map(one => {look})")
        assert len(looks) == len(set(looks)) == 11


def test_hostile_names_are_text_and_nothing_else(opened, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    run = write_run(tmp_path / name, pictures=1)
    row = {"name": f"{ODD}\x1b[2J\ud800.png", "sample": 1, "reason": "<b>no</b>"}
    write_lines(run / "quarantine.jsonl", [row])
    (run / "baselines.json").write_text(json.dumps({ODD: 1.0}))
    rows, notes = [probe_row(ODD, "model", 0.5)], [f"not clearly better {ODD}"]
    write_result(run / "probe", "probe", rows, test=ODD, notes=notes)
    page = opened(run_page(read_run(run)))
    assert page.locator("h1").inner_text() == name
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("document.querySelectorAll('td b, img[src=x]').length") == 0
    assert "\\x1b[2J\\ud800.png" in page.locator("#unreadable-images").inner_text()
    assert ODD in page.locator("#charts").inner_text()
    page = opened(comparison_page(compared(run, write_run(tmp_path / "other", scale=2))))
    assert name in page.locator("#relations").inner_html().replace("&lt;", "<").replace("&gt;", ">")


def test_a_comparison_has_a_point_for_each_run(opened, runs):
    page = opened(comparison_page(compared(*runs)))
    check_layout(page)
    chart = page.locator("#relations figure").first
    assert chart.locator("svg > circle").count() == 3
    assert "Pearson r -0.99" in chart.inner_text()
    assert f"Accuracy: {KNN}." in page.locator("#loss-accuracy-and-cost").inner_text()
    titles = [title.partition(" by ")[2] for title in page.locator("#relations h3").all_inner_texts()]
    assert titles == ["validation loss", *["model FLOPs"] * 2, *["images seen"] * 2]
