"""The report as a page: what it holds, that names do no harm in it, and that it works offline."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from nextblock.errors import UsageError
from nextblock.presets import get_preset, resolve
from nextblock.report import Comparison, comparison_page, page_values, read, read_run, run_page
from nextblock.report import compare as comparing
from nextblock.report import page as paging
from nextblock.settings import to_dict
from serving import browser  # noqa: F401 - a fixture
from test_report import probe_row, train_line, write_result
from tiny_runs import call_cli

ODD = "</script><script>alert(1)</script>"


def write_run(
    run: Path, *, scale: float = 1.0, steps: int = 60, pictures: int = 0, changes: dict | None = None
) -> Path:
    """A finished run with all that a page shows but results and pictures, unless asked for."""
    run.mkdir(parents=True)
    sources = {"data.train": "digits", "data.val": "digits:split=test"}
    config = resolve(get_preset("xtra-tiny").config, sources, changes or {})
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (run / "source.json").write_text(json.dumps({"train": {"num_images": 1437}}))
    (run / "baselines.json").write_text('{"zero": 0.9948, "copy_previous": 1.9202}')
    beat = {"status": "finished", "step": steps, "total_steps": steps, "host": "here", "message": None}
    (run / "heartbeat.json").write_text(json.dumps({**beat, "time": datetime.now(UTC).isoformat()}))
    start = {
        "started": "2026-11-30T04:27:28+0000",
        "host": "here",
        "device": "a GPU",
        "command": ["nextblock"],
    }
    (run / "environment.json").write_text(json.dumps([{**start, "step": 0}, {**start, "step": 20}]))
    lines, more = [], {"grad_norm": 1.0, "data_wait": 0.02, "tflops": 0.01, "memory_gb": 2}
    for step in range(10, steps + 1, 10):
        lines.append(train_line(step, scale / step, 50.0) | more)
        lines.append({"kind": "val", "step": step, "val_loss": 1.1 * scale / step})
        lines.append({"kind": "monitor", "step": step, "knn/top1": 0.9 - scale / 10, "rankme": 5.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(pictures):
        (run / "pictures").mkdir(exist_ok=True)
        pixels = np.full((30, 60, 3), 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(run / "pictures" / f"step_{10 * number:08d}.png")
    return run


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Three runs of falling loss and rising accuracy."""
    return [write_run(tmp_path / "runs" / f"run {i}", scale=3.0 - i, steps=40 + 10 * i) for i in range(3)]


# -------------------------------------------------------------------------------------------------- reading


def test_settings_are_compared_with_those_of_the_preset(tmp_path):
    summary = read_run(write_run(tmp_path / "run", changes={"optim.lr": 0.5, "model.depth": 2}))
    assert summary.changed == {
        "model.depth": (4, 2),
        "data.train": (None, "digits"),
        "data.val": (None, "digits:split=test"),
        "optim.lr": (2e-3, 0.5),
    }


def test_a_run_knows_its_cost(tmp_path):
    summary = read_run(write_run(tmp_path / "run"))
    assert (summary.step, summary.batch_size) == (60, 64)
    assert summary.flops == pytest.approx(1e12 * 0.01 / 50 * 60 * 64)
    (tmp_path / "run" / "source.json").write_text('{"train": {"num_images": 20}}')
    assert read_run(tmp_path / "run").batch_size == 20, "a batch is no larger than its source"


def test_the_encoders_parameters_are_counted_in_the_head_of_its_file(tmp_path):
    from nextblock.checkpoint import save_model
    from nextblock.plan import count_parameters
    from toy import tiny_model

    run, model = write_run(tmp_path / "run"), tiny_model()
    assert read_run(run).encoder_parameters is None
    for step in (10, 60):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        save_model(folder / "model.safetensors", model)
    assert read_run(run).encoder_parameters == count_parameters(model.config).encoder
    (folder / "model.safetensors").write_bytes(b"cut")
    assert read_run(run).encoder_parameters == count_parameters(model.config).encoder, "of the one before"


def test_another_model_that_was_measured_below_a_run_keeps_its_own_name(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "pictures").mkdir()
    names = {"timm:vit": "timm:vit", "moved/away": "model", str(tmp_path): str(tmp_path)}
    names |= {str(run): "model", str(run / "pictures"): "pictures"}
    for i, model in enumerate(names):
        write_result(run / f"{i}", "probe", [probe_row("linear", "model", 0.5)])
        result = json.loads((run / f"{i}" / "probe.json").read_text())
        (run / f"{i}" / "probe.json").write_text(json.dumps({**result, "settings": {"model": model}}))
    assert [one.encoder for one in read_run(run).results] == list(names.values())


def test_what_eval_measured_is_read_once_and_a_scored_classifier_as_well(tmp_path):
    run = write_run(tmp_path / "run")
    row = {"encoder": "model", "method": "its own classifier", "top1": 0.75, "top1_se": 0.01}
    write_result(run / "eval", "eval", [row])
    result = {"verb": "eval", "rows": [row], "notes": [], "settings": {"model": [str(run)], "test": "PHOTOS"}}
    (run / "eval" / "eval.json").write_text(json.dumps(result))
    assert [one[:4] for one in read_run(run).results] == [("its own classifier", "PHOTOS", "model", 0.75)]
    write_result(run / "eval" / "0-run" / "probe", "probe", [probe_row("linear", "model", 0.5)])
    assert [one.method for one in read_run(run).results] == ["linear"]


def test_a_fine_tuning_is_reported_by_the_directory_it_was_written_to(tmp_path):
    out = tmp_path / "tuned"
    write_run(out / "model")
    with pytest.raises(UsageError, match="tuned is not a run"):
        read_run(out)
    with (out / "model" / "config.yaml").open("a") as file:
        file.write("finetune:\n  epochs: 3\n")
    rows = [{"encoder": name, "top1": top1} for name, top1 in (("model", 0.9), ("from scratch", 0.6))]
    write_result(out, "finetune", rows)
    summary = read_run(out)
    assert summary.is_tuned
    assert summary.last("loss") == (1 / 60, 60)
    assert [(one.encoder, one.top1) for one in summary.results] == [("model", 0.9), ("from scratch", 0.6)]
    html = run_page(summary)
    assert "nextblock classify --model" in html
    assert "<h2>Predictions</h2>" not in html


# --------------------------------------------------------------------------------------------------- values


def test_values_are_the_logged_numbers(tmp_path):
    values = page_values(read_run(write_run(tmp_path / "run", pictures=2)))
    charts = {chart["title"]: chart for chart in values["charts"]}
    loss = charts["Loss"]
    assert [one["name"] for one in loss["series"]] == ["training", "validation"]
    assert loss["series"][0]["x"] == [10, 20, 30, 40, 50, 60]
    assert loss["series"][0]["y"] == [1 / step for step in loss["series"][0]["x"]]
    assert loss["references"][0] == {"name": "predicting zero", "value": 0.9948}
    assert loss["marks"] == [20], "where it resumed"
    assert charts["kNN accuracy on digits:split=test"]["share"]
    assert charts["Time spent waiting for images"]["series"][0]["y"] == [0.02] * 6
    assert [one["step"] for one in values["pictures"]] == [0, 10]
    assert page_values(read_run(tmp_path / "run"), pictures=False)["pictures"] == []


def test_a_long_curve_keeps_its_means_and_its_extremes():
    y = np.random.default_rng(0).standard_normal(3 * read.MAX_POINTS)
    one = read.thinned(list(range(len(y))), y.tolist())
    by_three = y.reshape(-1, 3)
    np.testing.assert_allclose(one["y"], by_three.mean(1))
    assert (one["low"], one["high"]) == (by_three.min(1).tolist(), by_three.max(1).tolist())
    assert one["x"] == list(range(2, len(y), 3))


def test_of_many_or_large_pictures_some_are_shown_evenly_spaced(tmp_path, monkeypatch):
    summary = read_run(write_run(tmp_path / "run", pictures=9))
    largest = max(path.stat().st_size for path in summary.pictures)
    for name, most, steps in (
        ("MAX_PICTURES", 5, [0, 20, 40, 60, 80]),
        ("MAX_PICTURE_BYTES", 3 * largest, [0, 40, 80]),
    ):
        monkeypatch.setattr(paging, name, most)
        assert [one["step"] for one in page_values(summary)["pictures"]] == steps
    assert "3 of 9 pictures, evenly spaced." in run_page(summary)


# ---------------------------------------------------------------------------------------------------- words


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path):
    (tmp_path / "config.yaml").touch()
    html = run_page(read_run(tmp_path))
    for words in (
        f"nextblock eval --model {tmp_path} --train TRAIN",
        f"nextblock predict --model {tmp_path} --data SOURCE",
        f"nextblock pretrain --out {tmp_path}<",
        "--data.val DIR2",
        "--monitor.knn_every 5ep",
        "Nothing is logged yet",
        "None: every image could be read so far.",
    ):
        assert words in html


def test_a_page_names_results_settings_starts_and_unreadable_images(tmp_path):
    run = write_run(tmp_path / "run", changes={"optim.lr": 0.5})
    note = "The model is not clearly better than pixels 16x16 (-2.0 ± 1.1 points)"
    write_result(run / "probe", "probe", [probe_row("linear", "model", 0.9512)], notes=[note])
    rows = [{"name": f"{i}.png", "sample": i, "reason": "cut off"} for i in range(12)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = run_page(read_run(run))
    assert "<tr><td>linear</td><td>digits:split=test</td><td class=n>95.1 ± 1.2</td></tr>" in html
    accuracy = html.split('<section id="accuracy">')[1].split("</section>")[0]
    assert f"probe/probe.json: {note}" in accuracy
    assert "<dt>training loss</dt><dd>0.0167 at step 60 (without a model: predicting zero 0.9948" in html
    assert "<dt>validation loss</dt><dd>0.0183 at step 60</dd>" in html
    assert "<tr><td>optim.lr</td><td>0.002</td><td>0.5</td></tr>" in html
    assert "12 images in quarantine.jsonl, the first 10:" in html
    assert "9.png" in html
    assert "10.png" not in html
    assert "<tr><td class=n>20</td><td>2026-11-30T04:27:28+0000</td><td>here</td>" in html


# --------------------------------------------------------------------------------------------- several runs


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
    found = Comparison([read_run(run) for run in runs])
    assert found.names == ["run 0", "run 1", "run 2"]
    assert [row["images"] for row in found.rows] == [64 * 40, 64 * 50, 64 * 60]
    losses, accuracies = [1.1 * 3 / 40, 1.1 * 2 / 50, 1.1 / 60], [0.6, 0.7, 0.8]
    assert [row["val_loss"] for row in found.rows] == pytest.approx(losses)
    (relation,) = found.relations
    assert (relation.accuracy, relation.runs) == ("kNN while training on digits:split=test", 3)
    assert relation.pearson == pytest.approx(np.corrcoef(losses, accuracies)[0, 1])
    assert relation.spearman == pytest.approx(-1)
    assert (found.differing, found.unlike) == ({}, {})
    json.dumps(found.values(), allow_nan=False)


def test_the_measure_that_most_runs_have_comes_first_and_is_drawn(runs):
    for run in runs[:2]:
        write_result(run / "probe", "probe", [probe_row("linear", "model", 0.5)])
    (runs[0] / "metrics.jsonl").write_text(json.dumps({"kind": "val", "step": 1, "val_loss": 2}) + "\n")
    (runs[1] / "metrics.jsonl").write_text("")
    found = Comparison([read_run(run) for run in runs])
    assert list(found.measures) == [
        "linear on digits:split=test",
        "kNN while training on digits:split=test",
    ]
    assert "no correlation of 1 run;" in found.relations[0].words


def test_the_accuracy_of_step_0_is_none_of_a_trained_model(tmp_path):
    runs = [write_run(tmp_path / name, scale=i + 1) for i, name in enumerate("ab")]
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "monitor"]
    first = json.dumps({"kind": "monitor", "step": 0, "knn/top1": 0.1})
    (runs[0] / "metrics.jsonl").write_text("\n".join([first, *kept]) + "\n")
    ((_, values),) = Comparison([read_run(run) for run in runs]).measures.items()
    assert values[0] is None
    assert values[1] is not None


def test_runs_of_one_size_are_not_drawn_by_size(tmp_path):
    runs = [write_run(tmp_path / name, scale=i + 1) for i, name in enumerate("abc")]
    weights = {"encoder.a": np.zeros(2, np.float32)}
    for number, run in enumerate(runs):
        (run / "checkpoints" / "step_00000060").mkdir(parents=True)
        more = {"encoder.b": np.zeros(1, np.float32)} if number == 2 else {}
        save_file(weights | more, run / "checkpoints" / "step_00000060" / "model.safetensors")
    # The run of another size has no accuracy.
    lines = (runs[2] / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "monitor"]
    (runs[2] / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    charts, _ = comparing._relation_charts(Comparison([read_run(run) for run in runs]))
    titles = [chart["title"] for chart in charts]
    assert "Validation loss by encoder parameters" in titles
    assert "Accuracy by encoder parameters" not in titles


def test_losses_of_different_targets_are_not_taken_for_comparable(tmp_path):
    changes = ({}, {"model.block_size": 4}, {"optim.lr": 1.0})
    runs = [read_run(write_run(tmp_path / str(i), changes=one)) for i, one in enumerate(changes)]
    found = Comparison(runs)
    assert found.unlike == {"losses": ["model.block_size"]}
    assert found.differing == {"model.block_size": [2, 4, 2], "optim.lr": [2e-3, 2e-3, 1.0]}
    assert "The runs differ in model.block_size" in comparison_page(found)
    assert Comparison([runs[0], runs[2]]).unlike == {}


def test_accuracies_on_other_images_or_from_other_labels_are_other_accuracies(tmp_path):
    knn = {"monitor.knn_every": "1ep", "monitor.knn_train": "A", "monitor.knn_val": "B"}
    runs = [write_run(tmp_path / str(i), changes=one, steps=40 + 10 * i) for i, one in enumerate(({}, knn))]
    for run, train in zip(runs, ("A", "TEN"), strict=True):
        write_result(run / "probe", "probe", [probe_row("linear", "model", 0.5)], train=train)
    found = Comparison([read_run(run) for run in runs])
    assert {name: [one is not None for one in values] for name, values in found.measures.items()} == {
        "linear on digits:split=test, labels from A": [True, False],
        "kNN while training on digits:split=test, labels from digits": [True, False],
        "linear on digits:split=test, labels from TEN": [False, True],
        "kNN while training on B, labels from A": [False, True],
    }
    titles = [chart["title"] for chart in comparing._curve_charts(found)]
    assert titles[2:4] == [
        "kNN accuracy on digits:split=test, labels from digits",
        "kNN accuracy on B, labels from A",
    ]
    by_cost = [f"Validation loss by {cost}" for cost in ("model FLOPs", "images seen")]
    assert [chart["title"] for chart in comparing._relation_charts(found)[0]] == by_cost, "no lone points"


def test_losses_on_other_images_are_not_compared_if_there_are_any(tmp_path):
    runs = [
        write_run(tmp_path / str(i), changes=one)
        for i, one in enumerate(({}, {"data.val": None}, {"data.train": "A", "data.val": "B"}))
    ]
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines()
    (runs[1] / "metrics.jsonl").write_text("".join(f"{one}\n" for one in lines if "val_loss" not in one))
    first, blind, other = map(read_run, runs)
    assert Comparison([first, blind]).unlike == {}
    assert comparing.comparison_table(Comparison([first, blind])).cells()[1][-3] == "-"
    both = {"training losses": ["data.train"], "validation losses": ["data.val"]}
    assert Comparison([first, other]).unlike == both


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def cli(capsys):
    return partial(call_cli, capsys)


def test_report_of_one_run_writes_a_page_into_it_or_leaves_the_run_alone(cli, tmp_path):
    run = write_run(tmp_path / "run")
    before = sorted(run.iterdir())
    code, out, _ = cli("report", run, "--out", tmp_path / "x.html", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["page"] == str(tmp_path / "x.html")
    assert sorted(run.iterdir()) == before
    assert cli("report", run)[0] == 0
    names = {path.name for path in set(run.iterdir()) - set(before)}
    assert names == {"report.md", "report.html", "losses.png"}
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_report_that_cannot_be_made_leaves_the_last_one(cli, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "report.md").write_text("the last")
    (run / "quarantine.jsonl").write_text("damaged\n")
    assert cli("report", run)[0] == 2
    assert (run / "report.md").read_text() == "the last"
    assert not (run / "losses.png").exists()


def test_report_of_several_runs_writes_one_page_beside_them_again_and_again(cli, runs):
    assert cli("report", *runs)[0] == 0
    code, out, _ = cli("report", *sorted(runs[0].parent.iterdir()), "--json")  # the page is among them
    assert code == 0
    values = json.loads(out.splitlines()[-1])
    assert values["page"] == str(runs[0].parent / "report.html")
    assert [row["run"] for row in values["runs"]] == ["run 0", "run 1", "run 2"]
    assert "validation loss and kNN while training on digits:split=test: Pearson r -0.99" in out
    assert not (runs[0] / "report.html").exists()


@pytest.mark.parametrize(
    ("out", "why"), [("x.txt", "FILE.html"), ("no/x.html", "there is no directory"), ("d.html", "FILE.html")]
)
def test_a_place_that_is_no_page_is_refused(cli, tmp_path, out, why):
    (tmp_path / "d.html").mkdir()
    code, _, err = cli("report", write_run(tmp_path / "run"), "--out", tmp_path / out)
    assert code == 2
    assert why in err


# ------------------------------------------------------------------------------------------------ a browser


@pytest.fixture
def opened(browser, tmp_path):  # noqa: F811
    """`opened(html)` -> the page in a browser; nothing may be fetched, and nothing may go wrong in it."""
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on(
        "request",
        lambda request: wrong.append(request.url) if request.url[:5] not in ("file:", "data:") else None,
    )

    def open_(html: str):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        page.goto(f"file://{tmp_path / 'page.html'}")
        return page

    yield open_
    page.close()
    assert wrong == []


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
    write_result(
        run / "probe", "probe", [probe_row("linear", name * 9, 0.5) for name in ("model", "untrained")]
    )
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
    runs = [read_run(write_run(tmp_path / str(i), steps=20 + 10 * i)) for i in range(11)]
    page = opened(comparison_page(Comparison(runs)))
    for marks in ("#charts figure:first-child .curve", "#relations figure:first-child svg > circle"):
        look = "one.getAttribute('stroke') ?? one.getAttribute('fill')"
        looks = page.locator(marks).evaluate_all(f"all => all.map(one => {look})")
        assert len(looks) == len(set(looks)) == 11


def test_hostile_names_are_text_and_nothing_else(opened, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    run = write_run(tmp_path / name, pictures=1)
    row = {"name": f"{ODD}\x1b[2J\ud800.png", "sample": 1, "reason": "<b>no</b>"}
    (run / "quarantine.jsonl").write_text(json.dumps(row) + "\n")
    (run / "baselines.json").write_text(json.dumps({ODD: 1.0}))
    write_result(
        run / "probe", "probe", [probe_row(ODD, "model", 0.5)], test=ODD, notes=[f"not clearly better {ODD}"]
    )
    page = opened(run_page(read_run(run)))
    assert page.locator("h1").inner_text() == name
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("document.querySelectorAll('td b, img[src=x]').length") == 0
    assert "\\x1b[2J\\ud800.png" in page.locator("#unreadable-images").inner_text()
    assert ODD in page.locator("#charts").inner_text()
    other = write_run(tmp_path / "other", scale=2)
    page = opened(comparison_page(Comparison([read_run(run), read_run(other)])))
    assert name in page.locator("#relations").inner_html().replace("&lt;", "<").replace("&gt;", ">")


def test_a_comparison_has_a_point_for_each_run(opened, runs):
    page = opened(comparison_page(Comparison([read_run(run) for run in runs])))
    check_layout(page)
    chart = page.locator("#relations figure").first
    assert chart.locator("svg > circle").count() == 3
    assert "Pearson r -0.99" in chart.inner_text()
    assert (
        "Accuracy: kNN while training on digits:split=test."
        in page.locator("#loss-accuracy-and-cost").inner_text()
    )
    titles = page.locator("#relations h3").all_inner_texts()
    assert [title.partition(" by ")[2] for title in titles] == [
        "validation loss",
        *["model FLOPs"] * 2,
        *["images seen"] * 2,
    ]
