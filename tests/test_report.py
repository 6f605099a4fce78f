import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from nextblock.report import plot_losses, read_run, report_markdown, report_table, report_values


def probe_row(head: str, encoder: str, top1: float) -> dict:
    return {"head": head, "encoder": encoder, "top1": top1, "top1_se": 0.012, "top5": 1.0, "lr": 1e-3}


def write_result(
    path: Path,
    verb: str,
    rows: list[dict],
    *,
    train: str = "digits",
    test: str | None = "digits:split=test",
    notes: Any = (),
) -> None:
    """A result as evaluations write it."""
    path.mkdir(parents=True, exist_ok=True)
    sources = {"train": {"spec": train}, **({"test": {"spec": test}} if test else {})}
    result = {"verb": verb, "rows": rows, "notes": list(notes), "sources": sources}
    (path / f"{verb}.json").write_text(json.dumps(result))


def write_lines(path: Path, lines: list[dict]) -> None:
    (path.parent / "config.yaml").touch()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def train_line(step: int, loss: float, images_per_s: float = 100.0) -> dict:
    return {"kind": "train", "step": step, "epoch": 0, "loss": loss, "lr": 1e-3, "images_per_s": images_per_s}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A finished run: three logged steps, one validation, kNN twice, a probe, pictures."""
    run = tmp_path / "run [red]"
    run.mkdir()
    lines = [
        train_line(10, 1.1, 100.0),
        {"kind": "monitor", "step": 10, "knn/top1": 0.5},
        train_line(20, 0.9, 900.0),
        train_line(30, 0.8125, 110.0),
        {"kind": "val", "step": 30, "val_loss": 0.75},
        {"kind": "monitor", "step": 30, "knn/top1": 0.625, "pictures/loss": 0.7},
    ]
    write_lines(run / "metrics.jsonl", lines)
    (run / "baselines.json").write_text('{"zero": 0.984375, "copy_previous": 1.5}')
    (run / "environment.json").write_text('[{"device": "a GPU"}]')
    rows = [
        probe_row("attentive", "model", 0.97),
        probe_row("linear", "model", 0.9512),
        probe_row("attentive", "untrained", 0.71),
        probe_row("linear", "untrained", 0.605),
        probe_row("linear", "pixels 16x16", 0.90),
    ]
    write_result(run / "probe", "probe", rows)
    (run / "pictures").mkdir()
    for step in (9, 30):
        (run / "pictures" / f"step_{step:08d}.png").write_bytes(b"")
    return run


def rendered(run: Path, width: int = 400) -> str:
    console = Console(width=width, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115 - closed with the test
    console.print(report_table(read_run(run)))
    console.file.close()
    return console.export_text()


# ------------------------------------------------------------------------------- reading


def test_a_run_is_read_from_its_files(run_dir):
    summary = read_run(run_dir)
    assert [line["step"] for line in summary.train] == [10, 20, 30]
    assert summary.last("loss") == (0.8125, 30)
    assert summary.images_per_s == 110.0, "the median, not the mean"
    assert summary.baselines == {"zero": 0.984375, "copy_previous": 1.5}
    assert summary.environment == {"device": "a GPU"}
    assert summary.picture == run_dir / "pictures" / "step_00000030.png"
    assert len(summary.results) == 5
    assert summary.notes == ()


def test_copies_of_pictures_are_ignored_and_drawn_predictions_come_first(run_dir):
    (run_dir / "pictures" / "step_50_copy.png").write_bytes(b"")
    assert [path.stem for path in read_run(run_dir).pictures] == ["step_00000009", "step_00000030"]
    (run_dir / "predict-val").mkdir()
    (run_dir / "predict-val" / "predictions.png").write_bytes(b"")
    assert read_run(run_dir).picture == run_dir / "predict-val" / "predictions.png"


def test_every_result_is_shown_with_the_images_it_was_measured_on(run_dir):
    write_result(run_dir / "suite" / "cifar", "probe", [probe_row("linear", "model", 0.5)], test="CIFAR-10")
    knn = [{"encoder": "model", "k": k, "top1": k / 100, "is_default": k == 20} for k in (5, 20)]
    write_result(run_dir / "knn", "knn", knn, test=None)
    few = [{"encoder": "model", "shots": shots, "top1": 0.3} for shots in ("5", "1%")]
    write_result(run_dir / "few", "fewshot", few)
    lines = report_markdown(read_run(run_dir)).splitlines()
    assert "| linear | digits:split=test | 95.1 ± 1.2 | 60.5 ± 1.2 | 90.0 ± 1.2 |" in lines
    assert "| linear | CIFAR-10 | 50.0 ± 1.2 | - | - |" in lines
    assert "| kNN, k 20 | digits, each by the others | 20.0 | - | - |" in lines
    assert "| 5 labels a class | digits:split=test | 30.0 | - | - |" in lines
    assert "| 1% of the labels | digits:split=test | 30.0 | - | - |" in lines


def test_results_of_other_labels_or_other_files_have_rows_of_their_own(run_dir):
    ten = [probe_row("linear", "model", 0.5), probe_row("linear", "pixels 16x16", 0.3)]
    write_result(run_dir / "probe_b", "probe", ten, train="TEN")
    write_result(run_dir / "probe_c", "probe", ten[:1], train="TEN")
    lines = report_markdown(read_run(run_dir)).splitlines()
    on = "| linear | digits:split=test"
    assert f"{on} | digits |  | 95.1 ± 1.2 | 60.5 ± 1.2 | 90.0 ± 1.2 |" in lines
    assert f"{on} | TEN | probe_b/probe.json | 50.0 ± 1.2 | - | 30.0 ± 1.2 |" in lines
    assert f"{on} | TEN | probe_c/probe.json | 50.0 ± 1.2 | - | - |" in lines


def test_what_a_result_says_of_its_baselines_is_repeated_and_nothing_is_excused(run_dir):
    rows = [probe_row("linear", "model", 0.28), probe_row("linear", "pixels 16x16", 0.30)]
    note = "The model is not clearly better than pixels 16x16 (-2.0 ± 1.1 points)"
    write_result(run_dir / "probe", "probe", rows, notes=["400 images of test.", note])
    for text in (rendered(run_dir), report_markdown(read_run(run_dir))):
        assert f"probe/probe.json: {note}" in text
        assert "400 images" not in text


def test_a_line_that_is_being_written_is_left_out(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert len(read_run(run_dir).train) == 3


def test_losses_that_are_no_numbers_are_not_the_final_loss(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_line(40, float("nan"))) + "\n")
        file.write(json.dumps({**train_line(50, 0.0), "loss": None}) + "\n")
        file.write(json.dumps({"kind": "val", "step": 40, "val_loss": None}) + "\n")
    summary = read_run(run_dir)
    assert summary.last("loss") == (0.8125, 30)
    assert "0.8125 at step 30" in report_markdown(summary)
    for text in (rendered(run_dir), report_markdown(summary)):
        assert "NaN or infinite loss at step 40, 50." in text
        assert "NaN or infinite validation loss at step 40." in text
    assert "- validation loss: 0.7500 at step 30\n" in report_markdown(summary)


# ------------------------------------------------------------------------------- what is said


def test_the_table_holds_accuracies_speed_losses_and_the_picture(run_dir):
    text = rendered(run_dir)
    assert str(run_dir) in text, "brackets are no markup"
    rows = [line.split() for line in text.splitlines()]
    assert ["top-1", "%", "measured", "on", "model", "untrained", "pixels", "16x16"] in rows
    assert ["attentive", "digits:split=test", "97.0", "±", "1.2", "71.0", "±", "1.2", "-"] in rows
    for words in (
        "110 images/s on a GPU",
        "0.8125 at step 30",
        "predicting zero 0.9844",
        "0.7500 at step 30",
        "62.5%",
    ):
        assert words in text
    assert "step_00000030.png" in text


def test_a_failure_is_said_with_its_message(run_dir):
    beat = {
        "status": "failed",
        "message": "the disk is full",
        "step": 30,
        "time": "2026-11-30T04:27:28+00:00",
    }
    (run_dir / "heartbeat.json").write_text(json.dumps(beat))
    assert "- status: failed: the disk is full\n" in report_markdown(read_run(run_dir))
    assert "failed: the disk is full" in rendered(run_dir)
    assert report_values(read_run(run_dir))["message"] == "the disk is full"


def test_commands_name_the_run_wherever_they_are_typed(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir)
    text = report_markdown(read_run(Path()), losses=Path("losses.png"))
    assert text.startswith(f"# Report of {run_dir}\n")
    assert "![Loss by step](losses.png)" in text


def test_a_fine_tuning_is_compared_with_chance_and_not_with_tokens(run_dir):
    (run_dir / "baselines.json").write_text('{"chance": 1.3863}')
    assert "(without a model: all classes equally likely 1.3863)" in report_markdown(read_run(run_dir))


def test_missing_pieces_are_said_with_the_command_that_makes_them(tmp_path):
    (tmp_path / "config.yaml").touch()
    for text in (rendered(tmp_path), report_markdown(read_run(tmp_path))):
        assert f"nextblock eval --model {tmp_path}" in text
        assert f"nextblock predict --model {tmp_path}" in text
        assert text.count("not logged yet") == 2
    values = report_values(read_run(tmp_path))
    assert not any(value for name, value in values.items() if name not in ("run", "status"))
    assert values["final_loss"] is None


def test_the_values_for_programs_are_those_of_the_report(run_dir):
    values = report_values(read_run(run_dir))
    linear = {"method": "linear", "on": "digits:split=test", "top1_se": 0.012, "labels": "digits"}
    linear["file"] = "probe/probe.json"
    assert {**linear, "encoder": "model", "top1": 0.9512} in values["results"]
    assert len(values.pop("results")) == 5
    assert values == {
        "run": str(run_dir),
        "status": "stopped",
        "message": None,
        "notes": [],
        "final_loss": 0.8125,
        "final_step": 30,
        "baselines": {"zero": 0.984375, "copy_previous": 1.5},
        "val_loss": 0.75,
        "val_step": 30,
        "images_per_s": 110.0,
        "knn": {"top1": 0.625},
        "picture": str(run_dir / "pictures" / "step_00000030.png"),
    }


# ------------------------------------------------------------------------------- the curve


def test_the_curve_is_drawn_with_baselines_and_without(run_dir, tmp_path):
    pictures = []
    for name in ("with.png", "without.png"):
        plot_losses(read_run(run_dir), tmp_path / "out" / name)
        with Image.open(tmp_path / "out" / name) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
        (run_dir / "baselines.json").unlink(missing_ok=True)
    assert not np.array_equal(*pictures)
    blue = (pictures[0] == [0x09, 0x69, 0xDA]).all(-1)
    assert blue.sum() > 100, "the training loss"


def test_a_long_curve_may_have_holes_and_one_without_steps_is_refused(tmp_path):
    lines = [train_line(step, float("nan") if step == 70 else 1 / step) for step in range(1, 900)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    plot_losses(read_run(tmp_path), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    write_lines(tmp_path / "metrics.jsonl", [])
    with pytest.raises(ValueError, match="no training step"):
        plot_losses(read_run(tmp_path), tmp_path / "curve.png")


# ------------------------------------------------------------------------------- refusals


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run: it has no config\.yaml"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_run(tmp_path / "nowhere")


def test_a_damaged_line_is_refused_by_its_number(run_dir):
    text = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(text.replace('"step": 20', '"step": '))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3, is not JSON"):
        read_run(run_dir)


def test_damaged_side_files_are_refused(run_dir):
    (run_dir / "probe" / "probe.json").write_text(json.dumps({"rows": [{"head": "linear"}]}))
    with pytest.raises(ValueError, match=r"probe\.json is damaged or of an older release .*measure again"):
        read_run(run_dir)
    (run_dir / "probe" / "probe.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_run(run_dir)


def test_the_report_does_not_wait_for_torch():
    code = (
        "import sys; from nextblock.report import read_run, run_page; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
