"""Results in a notebook: they draw themselves, escape what they show, and docs/first_hour.ipynb runs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

from nextblock.cli import main
from nextblock.evaluate.evaluation import Result
from nextblock.tables import Column, Shown
from nextblock.train.logging import Reporter

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first_hour.ipynb"


@dataclass
class Drawn(Shown):
    picture: Path


def test_a_result_is_its_picture_and_outside_a_notebook_prints_where_it_is(tmp_path, capsys):
    drawn = Drawn(tmp_path / "picture.png")
    assert drawn._repr_png_() is None
    drawn.picture.write_bytes(b"PNG")
    assert drawn._repr_png_() == b"PNG"
    drawn.show()
    assert capsys.readouterr().out == f"{drawn.picture}\n"


def test_a_table_in_html_escapes_names_and_notes():
    columns = (Column("name", "image"), Column("none", "nothing"))
    result = Result(verb="knn", rows=({"name": "<b>&"},), notes=("a < b",), columns=columns)
    assert result._repr_html_() == (
        "<table><tr><th>image</th></tr><tr><td>&lt;b&gt;&amp;</td></tr></table><p>a &lt; b</p>"
    )


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_notebook_has_a_bar_if_it_can_draw_one_and_lines_otherwise(is_installed, monkeypatch):
    monkeypatch.setattr("nextblock.train.logging.find_spec", lambda _: is_installed or None)
    monkeypatch.setattr("nextblock.train.logging._TwoLines.start", lambda _: None)
    reporter = Reporter(Console(force_jupyter=True, width=80))
    reporter.begin(0, 10)
    assert (reporter._bar is not None) == is_installed


def test_the_notebook_in_the_repository_has_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.filterwarnings("default")  # of the Jupyter packages
def test_the_first_hour_runs_and_shows_pictures_and_accuracies(tmp_path, monkeypatch):
    """All cells as they are, but for three steps of training and a tenth of the digits."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 120), ("test", 60)):
        assert main(["data", "sample", f"digits:split={split}", f"{split}.txt", "--count", str(count)]) == 0
    text = NOTEBOOK.read_text().replace("6ep", "3st").replace("digits:split=train", "subset:train.txt")
    notebook = nbformat.reads(text.replace("digits:split=test", "subset:test.txt"), as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, startup_timeout=300, resources=where).execute()
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    _, order, trained, predictions, features, table, accuracies = shown

    def kinds(outputs):
        return [kind for one in outputs for kind in one.get("data", {})]

    assert not [one for outputs in shown for one in outputs if one.output_type == "error"]
    assert [kinds(outputs).count("image/png") for outputs in (order, predictions, features)] == [1, 1, 2]
    assert "application/vnd.jupyter.widget-view+json" in kinds(trained)  # the bar
    assert "val_loss" in trained[-1]["data"]["text/plain"]
    assert table[-1]["data"]["text/html"].count("<tr>") == 1 + 4 * 4  # encoders by numbers of neighbours
    found = dict(re.findall(r"([\w ]+?) ([\d.]+) %", accuracies[0]["text"].replace(",", "")))
    assert "model" in found
    assert all(0 < float(value) <= 100 for value in found.values())
