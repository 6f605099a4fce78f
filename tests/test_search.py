"""Search: what is nearest, the query itself among it, the sheet and the lists."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from evaluating import toy_table, toy_verb, written  # noqa: F401 - a fixture
from nextblock.cli import main
from nextblock.errors import UsageError
from nextblock.visualize.evaluation import draw_contact_sheet
from toy import ToySource, one_thread  # noqa: F401 - a fixture


def test_the_nearest_are_those_of_the_slow_definition(run):
    run.sources |= {"toy-0": ToySource(24, bad={4}), "toy-1": ToySource(3, seed=1)}
    found = run("search", data="toy-0", query="toy-1", top=4)
    known, asked = toy_table(run.sources["toy-0"]), toy_table(run.sources["toy-1"])
    known.fill()
    asked.fill()
    features, numbers = known.read(known.readable()), known.readable()
    rows = iter(found.rows)
    for query, vector in enumerate(asked.read(np.arange(3))):
        similarity = torch.cosine_similarity(features, vector[None])
        for rank, row in enumerate(similarity.argsort(descending=True)[:4].tolist(), start=1):
            line, index = next(rows), int(numbers[row])
            assert (line["query_index"], line["rank"], line["index"]) == (query, rank, index)
            assert line["similarity"] == pytest.approx(float(similarity[row]), abs=1e-6)
            assert (line["name"], line["class"]) == (f"toy-0[{index}]", "abcd"[index % 4])
            assert not line["is_query"]
    assert list(rows) == []
    assert found.facts["bad_images"] == {"data": 1, "query": 0}
    assert found.notes == ("23 images of toy-0 searched.",)


def test_a_query_of_the_searched_images_is_marked_and_does_not_count(run):
    run.sources["toy-1"] = ToySource(2)  # the first two of toy-0
    found = run("search", data="toy-0", query="toy-1", top=3)
    for query in range(2):
        lines = [row for row in found.rows if row["query_index"] == query]
        assert [line["is_query"] for line in lines] == [True, False, False, False]
        assert (lines[0]["index"], lines[0]["rank"]) == (query, 1)
        assert lines[0]["similarity"] == pytest.approx(1)
    assert found.table.cells()[0][3] == "toy-0[0] (the query itself)"


def test_an_image_as_near_as_the_query_but_of_other_pixels_is_not_the_query(run):
    source, other = ToySource(8), ToySource(1)
    source.images[0, 0, 0, 0] ^= 1
    run.sources |= {"toy-0": source, "toy-1": other}
    found = run("search", data="toy-0", query="toy-1", top=2)
    assert found.rows[0]["index"] == 0
    assert found.rows[0]["similarity"] > 1 - 1e-5
    assert not found.rows[0]["is_query"]
    assert len(found.rows) == 2


def test_fewer_images_than_asked_for_are_all_given_and_too_many_queries_refused(run):
    run.sources |= {"toy-0": ToySource(3), "toy-2": ToySource(65, seed=2)}
    assert len(run("search", data="toy-0", query="toy-1").rows) == 3 * 32
    with pytest.raises(UsageError, match="toy-2 has 65 images; give at most 64"):
        run("search", data="toy-0", query="toy-2")


def test_the_command_writes_a_sheet_and_lists_for_one_image_file(run, tmp_path, capsys):
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            level = np.array(colour) + 9 * number
            Image.new("RGB", (24, 18), tuple(level.tolist())).save(tmp_path / "data" / name / f"{number}.png")
    words = ["search", "--model", str(tmp_path / "model.safetensors"), "--data", str(tmp_path / "data")]
    words += ["--query", str(tmp_path / "data" / "red" / "1.png"), "--top", "2", "--device", "cpu"]
    words += ["--workers", "0", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert f"Sheet: {tmp_path / 'out' / 'sheet.png'}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "search.csv",
        "search.json",
        "search.md",
        "sheet.png",
    ]
    with (tmp_path / "out" / "search.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["is_query"] for line in lines] == ["True", "False", "False"]
    assert {line["class"] for line in lines} == {"red"}
    assert [row["name"] for row in written(tmp_path / "out" / "search.json")["rows"]] == [
        line["name"] for line in lines
    ]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
        assert sheet.format == "PNG"
    shown = {tuple(colour) for colour in pixels.tolist()}
    assert {(200 + 9 * n, 40 + 9 * n, 40 + 9 * n) for n in range(3)} <= shown
    assert (40, 40, 200) not in shown
    (tmp_path / "out" / "search.json").unlink()  # as if killed before it was written
    assert main(words) == 0


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_any_channels_are_drawn_and_long_rows_wrap(tmp_path, channels):
    class Channels(ToySource):
        def _read(self, index):
            return self.images[index][[0] * channels]

    rows = [
        {"query_index": 0, "index": index, "similarity": 0.5, "class": None, "name": "$x_", "is_query": False}
        for index in range(9)
    ]
    draw_contact_sheet(rows, Channels(1, seed=1), Channels(9), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height
