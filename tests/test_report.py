"""The report of a run: what is read from its files, what is said of it, and the page that works offline."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from nextblock.checkpoint import save_model
from nextblock.errors import UsageError
from nextblock.plan import count_parameters
from nextblock.presets import get_preset, resolve
from nextblock.report import page as paging
from nextblock.report import (
    page_values,
    plot_losses,
    read,
    read_run,
    report_markdown,
    report_table,
    report_values,
    run_page,
)
from nextblock.settings import to_dict
from tiny_runs import call_cli
from toy import tiny_model

BASELINES = {"zero": 0.9948, "copy_previous": 1.9202}


def probe_row(head: str, encoder: str, top1: float) -> dict:
    return {"head": head, "encoder": encoder, "top1": top1, "top1_se": 0.012, "top5": 1.0, "lr": 1e-3}


PROBED = [
    *(probe_row("attentive", "model", 0.97), probe_row("linear", "model", 0.9512)),
    *(probe_row("attentive", "untrained", 0.71), probe_row("linear", "untrained", 0.605)),
    probe_row("linear", "pixels 16x16", 0.90),
]


def write_result(
    path: Path, verb: str, rows: list[dict], *, train="digits", test: Any = "digits:split=test", **more: Any
) -> None:
    """A result as evaluations write it."""
    path.mkdir(parents=True, exist_ok=True)
    sources = {"train": {"spec": train}, **({"test": {"spec": test}} if test else {})}
    result = {"verb": verb, "rows": rows, "notes": [], "sources": sources, **more}
    (path / f"{verb}.json").write_text(json.dumps(result))


def write_lines(path: Path, lines: list[dict], mode: str = "w") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_run(
    run: Path, *, scale: float = 1.0, steps: int = 60, pictures: int = 0, changes: dict | None = None
) -> Path:
    """A finished run with all that a page shows but results and pictures, unless asked for."""
    run.mkdir(parents=True)
    sources = {"data.train": "digits", "data.val": "digits:split=test"}
    config = resolve(get_preset("xtra-tiny").config, sources, changes or {})
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (run / "source.json").write_text(json.dumps({"train": {"num_images": 1437}}))
    (run / "baselines.json").write_text(json.dumps(BASELINES))
    beat = {"status": "finished", "step": steps, "total_steps": steps, "host": "here", "message": None}
    (run / "heartbeat.json").write_text(json.dumps({**beat, "time": datetime.now(UTC).isoformat()}))
    start: dict[str, Any] = {"started": "2026-11-30T04:27:28+0000", "host": "here", "device": "a GPU"}
    start["command"] = ["nextblock"]
    (run / "environment.json").write_text(json.dumps([{**start, "step": 0}, {**start, "step": 20}]))
    lines, more = [], {"grad_norm": 1.0, "data_wait": 0.02, "tflops": 0.01, "memory_gb": 2}
    for step in range(10, steps + 1, 10):
        more["images_per_s"] = 900.0 if step == 20 else 50.0
        lines.append({"kind": "train", "step": step, "epoch": 0, "loss": scale / step, "lr": 1e-3, **more})
        lines.append({"kind": "val", "step": step, "val_loss": 1.1 * scale / step})
        lines.append({"kind": "monitor", "step": step, "knn/top1": 0.9 - scale / 10, "rankme": 5.5})
    write_lines(run / "metrics.jsonl", lines)
    for number in range(pictures):
        (run / "pictures").mkdir(exist_ok=True)
        pixels = np.full((30, 60, 3), 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(run / "pictures" / f"step_{10 * number:08d}.png")
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run of 60 steps with two pictures and a probe."""
    run = write_run(tmp_path / "run [red]", pictures=2)
    write_result(run / "probe", "probe", PROBED)
    return run


def rendered(run: Path) -> str:
    with Path(os.devnull).open("w") as file:
        console = Console(width=400, record=True, file=file)
        console.print(report_table(read_run(run)))
    return console.export_text()


def markdown(run: Path) -> str:
    return report_markdown(read_run(run))


def page_of(run: Path) -> str:
    return run_page(read_run(run))


def test_the_values_for_programs_are_those_of_the_files(run):
    values = report_values(read_run(run))
    linear = {"method": "linear", "on": "digits:split=test", "top1_se": 0.012, "labels": "digits"}
    linear["file"] = "probe/probe.json"
    assert {**linear, "encoder": "model", "top1": 0.9512} in values["results"]
    assert len(values.pop("results")) == 5
    assert values == {
        **{"run": str(run), "status": "finished", "message": None, "notes": [], "baselines": BASELINES},
        **{"final_loss": 1 / 60, "final_step": 60, "val_loss": 1.1 / 60, "val_step": 60},
        "images_per_s": 50.0,  # the median, not the mean
        "knn": {"top1": 0.8},
        "picture": str(run / "pictures" / "step_00000010.png"),
    }


def test_copies_of_pictures_are_ignored_and_drawn_predictions_come_first(run):
    (run / "pictures" / "step_50_copy.png").write_bytes(b"")
    assert [path.stem for path in read_run(run).pictures] == ["step_00000000", "step_00000010"]
    (run / "predict-val").mkdir()
    (run / "predict-val" / "predictions.png").write_bytes(b"")
    assert read_run(run).picture == run / "predict-val" / "predictions.png"


def test_on_a_narrow_terminal_a_long_source_is_named_once_and_no_number_is_cut(run):
    shutil.rmtree(run / "probe")
    source = "files:/data/a_long_path/to_the_lists/val.txt"
    write_result(run / "a", "probe", PROBED, test=source)
    write_result(run / "b", "probe", PROBED, test=source)
    with Path(os.devnull).open("w") as file:
        console = Console(width=80, record=True, file=file)
        console.print(report_table(read_run(run)))
    lines = console.export_text().splitlines()
    assert sum(source in line for line in lines) == 1
    assert [line.split()[:5] for line in lines if line.startswith("linear")] == [
        ["linear", f"{name}/probe.json", "95.1", "±", "1.2"] for name in "ab"
    ]


def test_every_result_is_shown_with_the_images_it_was_measured_on(run):
    write_result(run / "suite" / "cifar", "probe", [probe_row("linear", "model", 0.5)], test="CIFAR-10")
    knn = [{"encoder": "model", "k": k, "top1": k / 100, "is_default": k == 20} for k in (5, 20)]
    write_result(run / "knn", "knn", knn, test=None)
    few = [{"encoder": "model", "shots": shots, "top1": 0.3} for shots in ("5", "1%")]
    write_result(run / "few", "fewshot", few)
    lines = markdown(run).splitlines()
    assert "| linear | digits:split=test | 95.1 ± 1.2 | 60.5 ± 1.2 | 90.0 ± 1.2 |" in lines
    assert "| linear | CIFAR-10 | 50.0 ± 1.2 | - | - |" in lines
    assert "| kNN, k 20 | digits, each by the others | 20.0 | - | - |" in lines
    assert "| 5 labels a class | digits:split=test | 30.0 | - | - |" in lines
    assert "| 1% of the labels | digits:split=test | 30.0 | - | - |" in lines
    assert sum(line.startswith("| kNN") for line in lines) == 1, "of the k that was fixed beforehand"


def test_results_of_other_labels_or_other_files_have_rows_of_their_own(run):
    ten = [probe_row("linear", "model", 0.5), probe_row("linear", "pixels 16x16", 0.3)]
    write_result(run / "probe_b", "probe", ten, train="TEN")
    write_result(run / "probe_c", "probe", ten[:1], train="TEN")
    lines, on = markdown(run).splitlines(), "| linear | digits:split=test"
    assert f"{on} | digits |  | 95.1 ± 1.2 | 60.5 ± 1.2 | 90.0 ± 1.2 |" in lines
    assert f"{on} | TEN | probe_b/probe.json | 50.0 ± 1.2 | - | 30.0 ± 1.2 |" in lines
    assert f"{on} | TEN | probe_c/probe.json | 50.0 ± 1.2 | - | - |" in lines


def test_another_model_that_was_measured_below_a_run_keeps_its_own_name(run, tmp_path):
    (run / "probe" / "probe.json").unlink()
    names = {"timm:vit": "timm:vit", "moved/away": "model", str(tmp_path): str(tmp_path)}
    names |= {str(run): "model", str(run / "pictures"): "pictures"}
    for i, model in enumerate(names):
        rows = [probe_row("linear", "model", 0.5)]
        write_result(run / f"{i}", "probe", rows, settings={"model": model})
    assert [one.encoder for one in read_run(run).results] == list(names.values())


def test_what_eval_measured_is_read_once_and_a_scored_classifier_as_well(tmp_path):
    run = write_run(tmp_path / "run")
    row = {"encoder": "model", "method": "its own classifier", "top1": 0.75, "top1_se": 0.01}
    settings = {"model": [str(run)], "test": "PHOTOS"}
    write_result(run / "eval", "eval", [row], settings=settings, sources={})
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
    (out / "model" / "baselines.json").write_text('{"chance": 1.3863}')
    rows = [{"encoder": name, "top1": top1} for name, top1 in (("model", 0.9), ("from scratch", 0.6))]
    write_result(out, "finetune", rows)
    summary = read_run(out)
    assert summary.last("loss") == (1 / 60, 60)
    assert [(one.encoder, one.top1) for one in summary.results] == [("model", 0.9), ("from scratch", 0.6)]
    assert "(without a model: all classes equally likely 1.3863)" in report_markdown(summary)
    html = run_page(summary)
    assert "nextblock classify --model" in html
    assert "<h2>Predictions</h2>" not in html


def test_a_run_knows_its_changed_settings_and_its_cost(tmp_path):
    run = write_run(tmp_path / "run", changes={"optim.lr": 0.5, "model.depth": 2})
    summary = read_run(run)
    sources = {"data.train": (None, "digits"), "data.val": (None, "digits:split=test")}
    assert summary.changed == {"model.depth": (4, 2), **sources, "optim.lr": (2e-3, 0.5)}
    assert (summary.step, summary.batch_size) == (60, 64)
    assert summary.flops == pytest.approx(1e12 * 0.01 / 50 * 60 * 64)
    (run / "source.json").write_text('{"train": {"num_images": 20}}')
    assert read_run(run).batch_size == 20, "a batch is no larger than its source"


def test_the_encoders_parameters_are_counted_in_the_head_of_its_file(run):
    model = tiny_model()
    assert read_run(run).encoder_parameters is None
    for step in (10, 60):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        save_model(folder / "model.safetensors", model)
    assert read_run(run).encoder_parameters == count_parameters(model.config).encoder
    (folder / "model.safetensors").write_bytes(b"cut")
    assert read_run(run).encoder_parameters == count_parameters(model.config).encoder, "of the one before"


def test_losses_that_are_no_numbers_are_not_the_final_loss_and_a_half_line_is_left_out(run):
    lines = [{"kind": "train", "step": 70, "loss": float("nan")}, {"kind": "train", "step": 80, "loss": None}]
    write_lines(run / "metrics.jsonl", [*lines, {"kind": "val", "step": 70, "val_loss": None}], "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in read_run(run).train] == [10, 20, 30, 40, 50, 60, 70, 80]
    for text in (rendered(run), markdown(run), page_of(run)):
        assert "0.0167 at step 60" in text
        assert "0.0183 at step 60" in text
        assert "NaN or infinite loss at step 70, 80." in text
        assert "NaN or infinite validation loss at step 70." in text


def test_the_table_holds_accuracies_speed_losses_and_the_picture(run):
    text = rendered(run)
    assert str(run) in text, "brackets are no markup"
    rows = [line.split() for line in text.splitlines()]
    assert ["top-1", "%", "measured", "on", "model", "untrained", "pixels", "16x16"] in rows
    assert ["attentive", "digits:split=test", "97.0", "±", "1.2", "71.0", "±", "1.2", "-"] in rows
    for words in ("50 images/s on a GPU", "predicting zero 0.9948", "80.0%", "step_00000010.png"):
        assert words in text


def test_what_a_result_says_of_its_baselines_is_repeated_and_nothing_is_excused(run):
    note = "The model is not clearly better than pixels 16x16 (-2.0 ± 1.1 points)"
    write_result(run / "probe", "probe", PROBED, notes=["400 images of test.", note])
    accuracy = page_of(run).split('<section id="accuracy">')[1].split("</section>")[0]
    for text in (rendered(run), markdown(run), accuracy):
        assert f"probe/probe.json: {note}" in text
        assert "400 images" not in text


def test_a_failure_is_said_with_its_message(run):
    beat = json.loads((run / "heartbeat.json").read_text())
    (run / "heartbeat.json").write_text(
        json.dumps({**beat, "status": "failed", "message": "the disk is full"})
    )
    assert "- status: failed: the disk is full\n" in markdown(run)
    assert "failed: the disk is full" in rendered(run)
    assert report_values(read_run(run))["message"] == "the disk is full"


def test_commands_name_the_run_wherever_they_are_typed(run, monkeypatch):
    monkeypatch.chdir(run)
    text = report_markdown(read_run(Path()), losses=Path("losses.png"))
    assert text.startswith(f"# Report of {run}\n")
    assert "![Loss by step](losses.png)" in text


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path):
    (tmp_path / "config.yaml").touch()
    html = page_of(tmp_path)
    for text in (rendered(tmp_path), markdown(tmp_path), html):
        assert f"nextblock eval --model {tmp_path} --train TRAIN" in text
        assert f"nextblock predict --model {tmp_path} --data SOURCE" in text
        assert text.count("not logged yet") == 2
    for words in (
        f"nextblock pretrain --out {tmp_path}<",
        "--data.val DIR2",
        "--monitor.knn_every 5ep",
        "Nothing is logged yet",
        "None: every image could be read so far.",
    ):
        assert words in html
    values = report_values(read_run(tmp_path))
    assert not any(value for name, value in values.items() if name not in ("run", "status"))
    assert (values["status"], values["final_loss"]) == ("stopped", None)


def test_a_page_names_settings_starts_and_unreadable_images(tmp_path):
    run = write_run(tmp_path / "run", changes={"optim.lr": 0.5})
    write_result(run / "probe", "probe", [probe_row("linear", "model", 0.9512)])
    rows = [{"name": f"{i}.png", "sample": i, "reason": "cut off"} for i in range(12)]
    write_lines(run / "quarantine.jsonl", rows)
    html = page_of(run)
    assert "<tr><td>linear</td><td>digits:split=test</td><td class=n>95.1 ± 1.2</td></tr>" in html
    assert "<dt>training loss</dt><dd>0.0167 at step 60 (without a model: predicting zero 0.9948" in html
    assert "<tr><td>optim.lr</td><td>0.002</td><td>0.5</td></tr>" in html
    assert "12 images in quarantine.jsonl, the first 10:" in html
    assert ("9.png" in html, "10.png" in html) == (True, False)
    assert "<tr><td class=n>20</td><td>2026-11-30T04:27:28+0000</td><td>here</td>" in html


def test_a_pages_values_are_the_logged_numbers(run):
    values = page_values(read_run(run))
    charts = {chart["title"]: chart for chart in values["charts"]}
    training, validation = charts["Loss"]["series"]
    assert (training["name"], validation["name"]) == ("training", "validation")
    assert training["x"] == [10, 20, 30, 40, 50, 60]
    assert training["y"] == [1 / step for step in training["x"]]
    assert charts["Loss"]["references"][0] == {"name": "predicting zero", "value": 0.9948}
    assert charts["Loss"]["marks"] == [20], "where it resumed"
    assert charts["kNN accuracy on digits:split=test"]["share"]
    assert charts["Time spent waiting for images"]["series"][0]["y"] == [0.02] * 6
    assert [one["step"] for one in values["pictures"]] == [0, 10]
    assert page_values(read_run(run), pictures=False)["pictures"] == []


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
    few, three = [0, 20, 40, 60, 80], [0, 40, 80]
    for name, most, steps in (("MAX_PICTURES", 5, few), ("MAX_PICTURE_BYTES", 3 * largest, three)):
        monkeypatch.setattr(paging, name, most)
        assert [one["step"] for one in page_values(summary)["pictures"]] == steps
    assert "3 of 9 pictures, evenly spaced." in run_page(summary)


def test_the_curve_is_drawn_with_baselines_and_without_and_may_have_holes(run, tmp_path):
    pictures = []
    for name in ("with.png", "without.png"):
        plot_losses(read_run(run), tmp_path / "out" / name)
        with Image.open(tmp_path / "out" / name) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
        (run / "baselines.json").unlink(missing_ok=True)
    assert not np.array_equal(*pictures)
    assert (pictures[0] == [0x09, 0x69, 0xDA]).all(-1).sum() > 100, "the training loss is blue"
    losses = [float("nan") if step == 70 else 1 / step for step in range(1, 900)]
    lines = [{"kind": "train", "step": i, "loss": loss, "lr": 1e-3} for i, loss in enumerate(losses, 1)]
    write_lines(run / "metrics.jsonl", lines)
    plot_losses(read_run(run), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    write_lines(run / "metrics.jsonl", [])
    with pytest.raises(ValueError, match="no training step"):
        plot_losses(read_run(run), tmp_path / "curve.png")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"kind": "train"}\n{"step": \n', r"metrics\.jsonl, line 2, is not JSON"),
        ("probe/probe.json", "{", "not JSON"),
        ("probe/probe.json", '{"rows": [{"head": "linear"}]}', r"damaged or of an older .*measure again"),
    ],
)
def test_damaged_files_are_refused(run, file, content, message):
    (run / file).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_run(run)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run: it has no config\.yaml"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        read_run(tmp_path / "nowhere")


def test_the_report_does_not_wait_for_torch():
    code = (
        "import sys; from nextblock.report import read_run, run_page; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def cli(capsys):
    return partial(call_cli, capsys)


def test_report_of_one_run_writes_a_page_into_it_or_leaves_the_run_alone(cli, run, tmp_path):
    before = sorted(run.iterdir())
    code, out, _ = cli("report", run, "--out", tmp_path / "x.html", "--json")
    values = json.loads(out.splitlines()[-1])
    assert (code, values["page"], values["final_step"]) == (0, str(tmp_path / "x.html"), 60)
    assert sorted(run.iterdir()) == before
    assert cli("report", run)[0] == 0
    names = {path.name for path in set(run.iterdir()) - set(before)}
    assert names == {"report.md", "report.html", "losses.png"}
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_report_that_cannot_be_made_leaves_the_last_one(cli, run):
    (run / "report.md").write_text("the last")
    (run / "quarantine.jsonl").write_text("damaged\n")
    assert cli("report", run)[0] == 2
    assert (run / "report.md").read_text() == "the last"
    assert not (run / "losses.png").exists()


@pytest.mark.parametrize(
    ("out", "why"), [("x.txt", "FILE.html"), ("no/x.html", "there is no directory"), ("d.html", "FILE.html")]
)
def test_a_place_that_is_no_page_is_refused(cli, run, tmp_path, out, why):
    (tmp_path / "d.html").mkdir()
    code, _, err = cli("report", run, "--out", tmp_path / out)
    assert code == 2
    assert why in err
