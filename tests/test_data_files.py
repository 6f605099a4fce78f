"""A list of files gives what its lines say, and refuses a line that is wrong by its number."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import BadImageError, Source, open_source
from nextblock.data.sources.subsets import write_subset

DATA = DataConfig()


def picture(path: Path, red: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (red, 100, 200)).save(path, "PNG")
    return path


def opened(folder: Path, content: str | bytes, data: DataConfig = DATA) -> Source:
    path = folder / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(f"files:{path}", data)


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_paths_are_relative_to_the_lists_folder_or_absolute_in_the_order_of_the_list(tmp_path) -> None:
    near = picture(tmp_path / "lists" / "b" / "2.dat", 2)
    far = picture(tmp_path / "elsewhere" / "1.png", 1)
    source = opened(tmp_path / "lists", f"b/2.dat\n{far}\n../elsewhere/1.png\n")
    assert names(source) == ["b/2.dat", str(far), "../elsewhere/1.png"]
    assert [int(source.read(index)[0, 0, 0]) for index in range(3)] == [2, 1, 1]
    assert source.content(0) == near.read_bytes()
    assert source.in_memory is False


def test_a_relative_list_is_read_from_another_working_directory(tmp_path, monkeypatch) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "list.txt").write_text("1.png\n")
    monkeypatch.chdir(tmp_path)
    source = open_source("files:list.txt", DATA)
    monkeypatch.chdir("/")
    assert source.read(0).shape == (3, 4, 6)


def test_blank_lines_comments_windows_ends_and_a_byte_order_mark_are_skipped(tmp_path) -> None:
    source = opened(tmp_path, b"\xef\xbb\xbf# a comment\r\n\r\n  \na b.png\r\n#c.png\nd.png")
    assert names(source) == ["a b.png", "d.png"]


def test_names_that_are_no_text_are_read_and_shown_escaped(tmp_path) -> None:
    picture(tmp_path / "1.png").rename(tmp_path / b"\xff.png".decode("utf-8", "surrogateescape"))
    source = opened(tmp_path, b"\xff.png\n")
    assert names(source) == ["\\xff.png"]
    assert source.read(0).shape == (3, 4, 6)


def test_spaces_around_a_path_are_told_where_the_file_is_there_without_them(tmp_path) -> None:
    picture(tmp_path / "1.png", 1)
    picture(tmp_path / " 2.png", 2)  # a name may begin with a space
    source = opened(tmp_path, " 1.png\n1.png  \n 2.png\n gone.png\n")
    hint = "No such file or directory; it is there without the spaces around its path in the list"
    for index in (0, 1):
        with pytest.raises(BadImageError) as caught:
            source.read(index)
        assert str(caught.value) == f"cannot be read: {hint}"
    assert int(source.read(2)[0, 0, 0]) == 2
    with pytest.raises(BadImageError, match=r"No such file or directory$"):
        source.read(3)


def test_a_missing_file_and_a_folder_are_bad_images_when_they_are_read(tmp_path) -> None:
    (tmp_path / "folder.png").mkdir()
    source = opened(tmp_path, "gone.png\nfolder.png\n")
    with pytest.raises(BadImageError, match="cannot be read: No such file"):
        source.read(0)
    with pytest.raises(BadImageError, match="cannot be read"):
        source.content(1)


def test_classes_follow_a_tab_and_sort_as_text(tmp_path) -> None:
    source = opened(tmp_path, "1.png\tdog\n2.png\tcat \n3.png\tdog\n")
    assert source.has_labels
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [1, 0, 1]
    assert names(source) == ["1.png", "2.png", "3.png"]


def test_classes_that_are_all_numbers_sort_as_numbers(tmp_path) -> None:
    source = opened(tmp_path, "1.png\t10\n2.png\t9\n3.png\t10\n")
    assert source.class_names == ("9", "10")
    assert source.labels.tolist() == [1, 0, 1]


def test_a_list_without_classes_has_no_labels(tmp_path) -> None:
    source = opened(tmp_path, "1.png\n2.png\n")
    assert not source.has_labels
    with pytest.raises(ValueError, match="no labels: they follow a tab after the path, and no line has one"):
        source.labels  # noqa: B018 - asking is what fails


def test_a_list_survives_pickling_and_is_small(tmp_path) -> None:
    source = opened(tmp_path, "".join(f"folder/{number}.png\tcat\n" for number in range(1000)))
    copied = pickle.dumps(source)
    assert len(copied) < 1000 * 40 + 2000
    assert names(pickle.loads(copied)) == names(source)


def test_the_fingerprint_is_of_the_names_in_their_order(tmp_path) -> None:
    base = opened(tmp_path, "1.png\n2.png\n").fingerprint
    assert base.startswith("files-2-")
    assert opened(tmp_path, "# again\n1.png\tcat\n2.png\tdog\n").fingerprint == base
    assert opened(tmp_path, "2.png\n1.png\n").fingerprint != base
    assert opened(tmp_path, "1.png2.png\n").fingerprint != base


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no images: every line is blank or a comment"),
        ("# nothing\n\n", "names no images"),
        ("1.png\tcat\n\n2.png\n", "line 1 has a class after a tab and line 3 has none; give every line one"),
        ("1.png\n# c\n2.png\tcat\n", "line 3 has a class after a tab and line 1 has none"),
        ("1.png\tcat\n2.png\t\n", "line 1 has a class after a tab and line 2 has none"),
        ("1.png\tcat\tdog\n", "line 1: write PATH, or PATH, one tab and its class"),
        ("\tcat\n", "line 1: write PATH, or PATH, one tab"),
        ("1.png\n2.png\n1.png\n", "line 3: '1.png' stands in line 1 already; name each once"),
        (b"\xff\xfe1\x00.\x00", "line 1: a zero byte; a list is text in UTF-8"),
    ],
)
def test_a_list_that_is_wrong_is_refused_by_the_line(tmp_path, content, message) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, content)


def test_a_list_that_is_not_there_is_refused_with_where_it_was_sought(tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"No such file or directory \({tmp_path}/gone.txt\)"):
        open_source(f"files:{tmp_path}/gone.txt", DATA)
    with pytest.raises(ValueError, match=r"cannot read 'files:.*': Is a directory"):
        open_source(f"files:{tmp_path}", DATA)


def test_a_list_named_without_its_kind_is_told_how_to_be_named(tmp_path) -> None:
    (tmp_path / "list.txt").touch()
    with pytest.raises(ValueError, match=rf"or files:{tmp_path}/list.txt if it lists images"):
        open_source(str(tmp_path / "list.txt"), DATA)


def test_a_list_of_a_subset_read_as_files_is_told_by_its_first_line(tmp_path):
    numbers = tmp_path / "part.txt"
    write_subset(numbers, open_source("digits", DataConfig()), np.arange(3))
    with pytest.raises(ValueError, match=r"is a list of a subset.*read it as subset:.*part\.txt"):
        open_source(f"files:{numbers}", DataConfig())
