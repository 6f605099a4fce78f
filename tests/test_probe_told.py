"""What a probe tells: of sources that overlap, of its grid, of rates that are not what they are named."""

from dataclasses import replace

import pytest

from nextblock.cli import main
from nextblock.data import Source
from nextblock.evaluate.probe.config import Split
from nextblock.evaluate.probe.run import probe, probe_model
from nextblock.evaluate.sources import are_same_images, open_labelled
from probing import QUICK, known_config, run
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

SEVERAL = replace(QUICK, lr=(1e-3, 1e-2), epochs=1)
SAID = "toy-0 is the same images as train: accuracy on them says nothing of new images"


@pytest.fixture
def known(monkeypatch, tmp_path):
    return replace(known_config(monkeypatch, tmp_path), epochs=1)


class Numbered(ToySource):
    """Toy pictures whose names are those of any other such source, which lies elsewhere."""

    def __init__(self, seed, place, bad=()):
        super().__init__(24, seed=seed, bad=bad)
        self.spec = place

    def _make_fingerprint(self):
        return "numbered"


def test_sources_are_the_same_if_names_and_pictures_are():
    one = Numbered(0, "one")
    assert are_same_images(one, Numbered(0, "copied"))
    assert not are_same_images(one, Numbered(1, "other"))
    assert not are_same_images(ToySource(24), ToySource(23))


def test_measuring_on_the_images_of_train_is_warned_of(known, caplog):
    probe(replace(known, val="toy-0"))
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert warning.getMessage() == f"val {SAID}"


def test_other_images_are_not_warned_of(known, caplog):
    open_labelled("toy-0", {"val": "toy-1", "test": "toy-2"}, DATA)
    assert "same images" not in caplog.text


def test_choosing_and_measuring_on_the_same_images_is_refused():
    given: dict[Split, Source] = {"val": ToySource(24, seed=1), "test": ToySource(24, seed=1)}
    with pytest.raises(
        ValueError, match=r"val toy-1 and test toy-1 are the same images.*chosen on; leave --val out"
    ):
        probe_model(toy_model(), SEVERAL, ToySource(48), given, DATA)
    chosen = probe_model(toy_model(), replace(SEVERAL, lr=(1e-2,)), ToySource(48), given, DATA).result
    assert chosen.chosen_on is None  # where nothing is chosen both are measured


def test_one_winner_is_not_several(known, tmp_path):
    config = replace(known, lr=(1e-3, 1e-2), heads=("linear",), test="toy-2")
    probe(config)
    said = "1 winner chosen among 2 heads on 48 images (val) that it is not measured on."
    assert said in (tmp_path / "out" / "probe.md").read_text()


def words(tmp_path, *more):
    return [
        *(
            "probe",
            "--model",
            "RUN",
            "--train",
            "toy-0",
            "--val",
            "toy-1",
            "--test",
            "toy-2",
            "--epochs",
            "1",
        ),
        *("--batch_size", "16", "--heads", "linear", "--baselines", "false", "--device", "cpu"),
        *("--out", str(tmp_path / "out"), *more),
    ]


def test_the_grid_is_printed_with_the_winner_marked(known, tmp_path, capsys):
    assert main(words(tmp_path, "--lr", "[0.001, 0.002, 0.01]")) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if "all candidates, on val" in line)
    grid = [
        line.split() for line in lines[start:] if line.strip().startswith("trained") and "val" not in line
    ]
    rates = [line[-4] for line in grid if "test" not in line]
    assert rates == ["0.001", "0.002", "0.01"]
    assert sum(line[1] == "*" for line in grid) == 1
    assert "Learning rates count" not in " ".join(lines)
    assert lines[-1].startswith(f"{tmp_path / 'out'}: probe.md, probe.csv, probe.json, figures/")
    assert lines[-1].endswith("linear/")


def test_a_large_grid_is_not_printed_but_named(known, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nextblock.cli.probe.MAX_PRINTED", 1)
    assert main(words(tmp_path, "--lr", "[0.001, 0.01]")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"All 2 candidates of the trained encoder: {tmp_path / 'out' / 'probe.md'}" in lines
    assert "all candidates, on val" not in " ".join(lines)


def test_rates_that_count_a_tenth_are_said_to(known, tmp_path, capsys):
    more = ("--lr", "0.01", "--warmup_epochs", "0", "--official_warmup_trap", "true")
    assert main(words(tmp_path, *more)) == 0
    said = "Learning rates count a tenth of their names (official_warmup_trap)"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "probe.md").read_text()
    assert run().result.resolved["official_warmup_trap"] is False


def test_pictures_of_another_result_do_not_stay(known, tmp_path):
    assert main(words(tmp_path, "--lr", "0.01")) == 0
    figures = tmp_path / "out" / "figures"
    (figures / "confusion-attentive.png").touch()
    (figures / "confusion-linear.png").write_bytes(b"old")
    assert main(words(tmp_path, "--lr", "0.01")) == 0  # which reads the result
    assert [path.name for path in figures.glob("confusion-*")] == ["confusion-linear.png"]
    assert (figures / "confusion-linear.png").stat().st_size > 1000
