"""Features in files: what they are, both formats, nearest images and thumbnails, resuming, refusals."""

import io
import json
import os
import signal

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from evaluating import toy_verb  # noqa: F401 - a fixture
from nextblock.cli import main
from nextblock.data import eval_batches, normalize
from nextblock.errors import UsageError
from nextblock.evaluate.embed import read_embeddings
from nextblock.evaluate.evaluation import Stopped
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture


@pytest.fixture
def embed(run, tmp_path):
    run.sources["toy-0"] = ToySource(10, bad={2, 7})
    return run.with_usual(verb="embed", data="toy-0", out=str(tmp_path / "features.npz"))


def place(tmp_path, suffix):
    return str(tmp_path / f"features{suffix}")


READABLE = [0, 1, 3, 4, 5, 6, 8, 9]


@pytest.mark.parametrize(
    ("suffix", "changes", "slow"),
    [
        (".parquet", {}, lambda model, e: model.final_norm(e.layers[1]).mean(1)),
        (".npz", {"norm": False}, lambda model, e: e.layers[1].mean(1)),
        (".npz", {"layers": "last2", "norm": False}, lambda _, e: ((e.layers[0] + e.layers[1]) / 2).mean(1)),
        (".parquet", {"layers": "layer0", "pool": "none"}, lambda model, e: model.final_norm(e.layers[0])),
        (
            ".npz",
            {"layers": "each"},
            lambda model, e: torch.stack([model.final_norm(x).mean(1) for x in e.layers], 1),
        ),
        (
            ".parquet",
            {"layers": "each", "pool": "none", "attention": "full"},
            lambda model, e: torch.stack([model.final_norm(x) for x in e.layers], 1),
        ),
    ],
)
def test_features_are_those_of_the_slow_definition_and_come_back_from_either_file(
    embed, tmp_path, suffix, changes, slow
):
    model, found = toy_model(), embed(out=place(tmp_path, suffix), **changes)
    expected = []
    for batch in eval_batches(embed.sources["toy-0"], DATA, 16, 1, READABLE):
        with torch.no_grad():
            images = normalize(batch.images, DATA.mean, DATA.std)
            expected.append(slow(model, model.encode(images, changes.get("attention", "native"))))
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, torch.cat(expected), atol=1e-5)
    again = read_embeddings(tmp_path / f"features{suffix}")
    assert np.array_equal(again.features, found.features)
    assert again.indices.tolist() == READABLE
    assert again.names == [f"toy-0[{index}]" for index in READABLE]
    assert again.labels is not None
    assert again.labels.tolist() == [index % 4 for index in READABLE]
    assert again.class_names == ("a", "b", "c", "d")
    assert again.about["bad"] == 2


def test_parquet_lists_the_nearest_images_and_shows_them(embed, tmp_path):
    found = embed(out=place(tmp_path, ".parquet"), neighbors=3, thumbnail_px=8)
    table = pyarrow.parquet.read_table(tmp_path / "features.parquet").to_pylist()
    features = found.features.astype(np.float64)
    normed = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1 - normed @ normed.T
    for row, line in enumerate(table):
        order = [other for other in distance[row].argsort() if other != row][:3]
        assert line["neighbors"]["ids"] == order
        np.testing.assert_allclose(line["neighbors"]["distances"], distance[row][order], atol=1e-5)
        picture = Image.open(io.BytesIO(line["thumbnail"]["bytes"]))
        assert (picture.format, picture.size) == ("PNG", (8, 8))
        mean = np.asarray(picture).mean((0, 1)) - embed.sources["toy-0"].images[line["index"]].numpy().mean(
            (1, 2)
        )
        assert np.abs(mean).max() < 2
        assert line["class"] == "abcd"[line["label"]]
    plane = np.array([[line["projection_x"], line["projection_y"]] for line in table])
    assert np.isfinite(plane).all()
    assert (plane.std(axis=0) > 0).all()


def test_unlabelled_images_plain_tables_and_a_single_image(embed, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "one.png")
    out = place(tmp_path, ".parquet")
    found = embed(out=out, data=str(tmp_path / "one.png"), thumbnail_px=0, neighbors=0)
    assert (found.features.shape, found.labels, found.class_names) == ((1, 32), None, None)
    assert found.names == ["one.png"]
    assert pyarrow.parquet.read_table(tmp_path / "features.parquet").column_names == [
        "index",
        "name",
        "feature",
        "projection_x",
        "projection_y",
    ]


# ---------------------------------------------------------------------------------- again, stopped, refused


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_the_same_command_reads_its_file_and_another_is_refused_unless_it_is_to_overwrite(
    embed, tmp_path, suffix
):
    embed = embed.with_usual(out=place(tmp_path, suffix))
    first = embed()
    content, reads = (tmp_path / f"features{suffix}").read_bytes(), embed.sources["toy-0"].reads
    assert np.array_equal(embed(encode_batch_size=3).features, first.features)
    assert embed.sources["toy-0"].reads == reads
    with pytest.raises(
        UsageError, match=r"holds other features \(settings.layers: last there, layer0 here\)"
    ):
        embed(layers="layer0")
    assert (tmp_path / f"features{suffix}").read_bytes() == content
    assert not np.array_equal(embed(layers="layer0", overwrite=True).features, first.features)


class Signals(ToySource):
    is_armed = True

    def _read(self, index):
        if index == 5 and self.is_armed:
            self.is_armed = False
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._read(index)


def test_one_that_was_stopped_resumes_and_leaves_nothing_but_its_file(embed, tmp_path):
    whole = embed(data="toy-0", out=str(tmp_path / "whole.npz")).features
    embed.sources["toy-0"] = source = Signals(10, bad={2, 7})
    with pytest.raises(Stopped, match="the same command resumes"):
        embed(encode_batch_size=2)
    assert not (tmp_path / "features.npz").exists()
    assert (tmp_path / ".features.npz.features").is_dir()
    stopped_at = source.reads
    assert np.array_equal(embed(encode_batch_size=2).features, whole)
    assert source.reads - stopped_at <= 7  # one unreadable image is tried again
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features.npz",
        "model.safetensors",
        "whole.npz",
    ]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".npz", b""), (".npz", b"PK\x03\x04mine"), (".parquet", b"mine"), (".parquet", b"PAR1mine")],
)
def test_a_file_of_something_else_is_kept(embed, tmp_path, suffix, content):
    (tmp_path / f"features{suffix}").write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as features.*; choose another --out"):
        embed(out=place(tmp_path, suffix))
    assert (tmp_path / f"features{suffix}").read_bytes() == content


def test_another_table_or_array_is_no_file_of_features(embed, tmp_path):
    np.savez(tmp_path / "features.npz", feature=np.ones(3))
    pyarrow.parquet.write_table(pyarrow.table({"feature": [1]}), tmp_path / "features.parquet")
    for suffix in (".npz", ".parquet"):
        with pytest.raises(UsageError, match="was not written by `nextblock embed`"):
            embed(out=place(tmp_path, suffix))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "x.npy"}, "out is 'x.npy'; it must be a file that ends in .parquet or .npz"),
        ({"tokens": "class", "pool": "none"}, "pool none needs tokens patches or all"),
        ({"layers": "best"}, "layers is 'best'"),
        ({"layers": "layer2"}, "the encoder has 2 layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(embed, changes, message):
    with pytest.raises(UsageError, match=message):
        embed(**changes)


def test_the_command_says_what_the_file_holds(run, tmp_path, capsys):
    words = ["embed", "--model", str(tmp_path / "model.safetensors"), "--data", "toy-0", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "a.npz"), "--workers", "0", "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == f"{tmp_path / 'a.npz'}: 48 x 32 features, 0 unreadable"
    assert json.loads(printed[-1]) == {"out": str(tmp_path / "a.npz"), "shape": [48, 32], "bad": 0}
