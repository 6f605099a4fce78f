"""Tables of results: what is shown, and that a class name can break neither Markdown nor a spreadsheet."""

import csv
import io

import pytest

from nextblock.logs import counted, label_words
from nextblock.tables import Column, Table, end_of, finite, lead, number, safe_cell, share, write_csv

COLUMNS = (
    Column("name", "features"),
    share("top1", "top-1 %"),
    lead("lead"),
    number("k", "k"),
    number("loss", "loss", ".2f"),
)
ROWS = (
    {"name": "model", "top1": 0.5, "top1_se": 0.0123, "k": 20},
    {"name": "pixels", "top1": 0.25, "lead": 0.25, "lead_se": 0.04, "k": None},
)


def test_a_column_without_any_text_is_left_out():
    table = Table(ROWS, COLUMNS)
    assert table.head == ["features", "top-1 %", "lead", "k"]
    assert table.cells() == [["model", "50.0 ± 1.2", "", "20"], ["pixels", "25.0", "+25.0 ± 4.0", ""]]


def test_all_or_none_right_has_no_error_beside_it():
    rows = [{"top1": top1, "top1_se": 0.01} for top1 in (1.0, 0.0, 0.999)]
    assert Table(rows, COLUMNS).cells() == [["100.0"], ["0.0"], ["99.9 ± 1.0"]]


def test_markdown_cells_stand_for_themselves():
    rows = ({"name": "a|b\\c\n<img>"}, {"name": "plain"})
    assert Table(rows, COLUMNS[:1]).markdown() == (
        "| features |\n| --- |\n| a\\|b\\\\c &lt;img> |\n| plain |\n"
    )


def test_a_wide_table_is_printed_whole_and_without_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    Table(({"name": "[red]x[/red] " + 100 * "y"},), COLUMNS[:1]).print()
    assert "[red]x[/red] " + 100 * "y" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "\tx", "\rx"])
def test_text_that_a_spreadsheet_would_run_is_quoted(text):
    safe = "'" + text.replace("\r", " ")
    assert safe_cell(text) == safe
    (row,) = csv.DictReader(io.StringIO(write_csv([{"name": text, "list": [text, "b"]}]), newline=""))
    assert row == {"name": safe, "list": f"{safe} b"}


def test_numbers_are_not_quoted_and_missing_values_are_empty():
    text = write_csv([{"a": -1.5, "b": [1, -2]}, {"a": None, "c": "x,y"}])
    assert text == 'a,b,c\n-1.5,1 -2,\n,,"x,y"\n'


def test_nan_and_infinity_become_null():
    values = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), "x", 2)}}
    assert finite(values) == {"a": None, "b": [1.5, None], "c": {"d": [None, "x", 2]}}


def test_counts_and_ends():
    counts = counted(1, "class", "classes"), counted(2, "class", "classes"), counted(12345, "image")
    assert counts == ("1 class", "2 classes", "12,345 images")
    assert (counted(1.0, "epoch"), counted(2.5, "epoch")) == ("1 epoch", "2.5 epochs")
    words = ["1 label a class", "5 labels a class", "1% of the labels"]
    assert [label_words(shots) for shots in ("1", "5", "1%")] == words
    assert (end_of("abcdef", 6), end_of("abcdef", 4)) == ("abcdef", "…def")
