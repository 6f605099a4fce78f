"""Features in files: what they are, both formats, nearest images and thumbnails, resuming, refusals."""

import io
import json
import signal

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from evaluating import Signals, toy_verb  # noqa: F401 - a fixture
from nextblock.cli import main
from nextblock.data import eval_batches, normalize
from nextblock.errors import UsageError
from nextblock.evaluate.embed import read_embeddings
from nextblock.evaluate.evaluation import Stopped
from nextblock.evaluate.files import write_parquet
from toy import DATA, ToySource, toy_model

READABLE = [0, 1, 3, 4, 5, 6, 8, 9]


@pytest.fixture
def embed(run, tmp_path):
    run.sources["toy-0"] = ToySource(10, bad={2, 7})
    return run.with_usual(verb="embed", data="toy-0", out=tmp_path / "features.npz")


@pytest.mark.parametrize(
    ("suffix", "changes", "slow"),
    [
        ("parquet", {}, lambda norm, layers: norm(layers[1]).mean(1)),
        ("npz", {"norm": False}, lambda _, layers: layers[1].mean(1)),
        ("npz", {"layers": "last2", "norm": False}, lambda _, layers: (layers[0] + layers[1]).mean(1) / 2),
        ("parquet", {"layers": "layer0", "pool": "none"}, lambda norm, layers: norm(layers[0])),
        ("npz", {"layers": "each"}, lambda norm, layers: torch.stack([norm(x).mean(1) for x in layers], 1)),
        (
            "parquet",
            {"layers": "each", "pool": "none", "attention": "full"},
            lambda norm, layers: torch.stack([norm(x) for x in layers], 1),
        ),
    ],
)
def test_features_are_those_of_the_slow_definition_and_come_back_from_either_file(
    embed, tmp_path, suffix, changes, slow
):
    model, found, expected = toy_model(), embed(out=tmp_path / f"f.{suffix}", **changes), []
    for batch in eval_batches(embed.sources["toy-0"], DATA, 16, 1, READABLE):
        with torch.no_grad():
            images = normalize(batch.images, DATA.mean, DATA.std)
            layers = model.encode(images, changes.get("attention", "native")).layers
            expected.append(slow(model.final_norm, layers))
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, torch.cat(expected), atol=1e-5)
    again = read_embeddings(tmp_path / f"f.{suffix}")
    assert np.array_equal(again.features, found.features)
    assert again.indices.tolist() == READABLE
    assert again.names == [f"toy-0[{index}]" for index in READABLE]
    assert again.labels is not None
    assert again.labels.tolist() == [index % 4 for index in READABLE]
    assert (again.class_names, again.about["bad"]) == (("a", "b", "c", "d"), 2)


def test_parquet_lists_the_nearest_images_and_shows_them(embed, tmp_path):
    features = embed(out=tmp_path / "a.parquet", neighbors=3, thumbnail_px=8).features.astype(np.float64)
    normed = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1 - normed @ normed.T
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for row, line in enumerate(table):
        order = [other for other in distance[row].argsort() if other != row][:3]
        assert line["neighbors"]["ids"] == order
        np.testing.assert_allclose(line["neighbors"]["distances"], distance[row][order], atol=1e-5)
        picture = Image.open(io.BytesIO(line["thumbnail"]["bytes"]))
        assert (picture.format, picture.size) == ("PNG", (8, 8))
        colour = embed.sources["toy-0"].images[line["index"]].numpy().mean((1, 2))
        assert np.abs(np.asarray(picture).mean((0, 1)) - colour).max() < 2
        assert line["class"] == "abcd"[line["label"]]
    plane = np.array([[line["projection_x"], line["projection_y"]] for line in table])
    assert np.isfinite(plane).all()
    assert (plane.std(axis=0) > 0).all()


def test_unlabelled_images_plain_tables_and_a_single_image(embed, tmp_path):
    image, out = tmp_path / "one.png", tmp_path / "a.parquet"
    Image.new("RGB", (30, 20), "red").save(image)
    found = embed(out=out, data=image, thumbnail_px=0, neighbors=0)
    assert (found.features.shape, found.names) == ((1, 32), ["one.png"])
    assert (found.labels, found.class_names) == (None, None)
    columns = ["index", "name", "feature", "projection_x", "projection_y"]
    assert pyarrow.parquet.read_table(out).column_names == columns


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_the_same_command_reads_its_file_and_another_is_refused_unless_it_is_to_overwrite(
    embed, tmp_path, suffix
):
    out = tmp_path / f"features.{suffix}"
    embed = embed.with_usual(out=out)
    first = embed()
    content, reads = out.read_bytes(), embed.sources["toy-0"].reads
    assert np.array_equal(embed(encode_batch_size=3).features, first.features)
    assert embed.sources["toy-0"].reads == reads
    with pytest.raises(UsageError, match=r"other features \(settings.layers: last there, layer0 here\)"):
        embed(layers="layer0")
    assert out.read_bytes() == content
    assert not np.array_equal(embed(layers="layer0", overwrite=True).features, first.features)


def test_one_that_was_stopped_resumes_and_leaves_nothing_but_its_file(embed, tmp_path):
    whole = embed(out=tmp_path / "whole.npz").features
    embed.sources["toy-0"] = source = Signals(10, bad={2, 7}, at=5, number=signal.SIGTERM)
    with pytest.raises(Stopped, match="the same command resumes"):
        embed(encode_batch_size=2)
    assert not (tmp_path / "features.npz").exists()
    assert (tmp_path / ".features.npz.features").is_dir()
    stopped_at = source.reads
    assert np.array_equal(embed(encode_batch_size=2).features, whole)
    assert source.reads - stopped_at <= 7  # one unreadable image is tried again
    assert {path.name for path in tmp_path.iterdir()} == {"features.npz", "model.safetensors", "whole.npz"}


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_file_of_something_else_is_kept(embed, tmp_path, suffix):
    out = tmp_path / f"features.{suffix}"
    files = dict.fromkeys((b"", b"PK\x03\x04mine", b"PAR1mine"), "cannot be read as features")
    if suffix == "npz":
        np.savez(out, feature=np.ones(3))
        others = [out.read_bytes()]
    else:
        table = pyarrow.table({"feature": [1]})
        pyarrow.parquet.write_table(table, out)
        others = [out.read_bytes()]
        write_parquet(out, [table], {})  # as classify does
        others.append(out.read_bytes())
    files |= dict.fromkeys(others, "was not written by `nextblock embed`")
    for content, message in files.items():
        out.write_bytes(content)
        with pytest.raises(UsageError, match=f"{message}.*; choose another --out"):
            embed(out=out)
        assert out.read_bytes() == content


def test_the_command_says_what_the_file_holds(embed, tmp_path, capsys):
    out, quick = str(tmp_path / "a.npz"), ("--device", "cpu", "--workers", "0", "--max_bad_fraction", "0.5")
    assert (
        main(["embed", "--model", embed.usual["model"], "--data", "toy-0", "--out", out, *quick, "--json"])
        == 0
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == f"{out}: 8 x 32 features, 2 unreadable"
    assert json.loads(printed[-1]) == {"out": out, "shape": [8, 32], "bad": 2}
