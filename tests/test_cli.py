"""The command line: how runs and errors end, and what every command prints."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import nextblock
from nextblock.cli import main
from nextblock.errors import UsageError
from nextblock.launch import World
from nextblock.logs import quote
from nextblock.presets import PRESETS
from tiny_runs import (
    TINY_FLAGS,
    Quiet,
    SignalAt,
    call_cli,
    checkpoints,
    metrics,
    refused,
    weights,
    write_images,
)

pytestmark = pytest.mark.usefixtures("coarse_pictures")


@pytest.fixture
def cli(capsys):
    """`cli("info", "RUN")` -> exit code, standard output, standard error."""
    return partial(call_cli, capsys)


@pytest.fixture
def tiny(cli, tmp_path):
    """`tiny(...)` pre-trains a tiny model on digits for three steps, into tmp_path/run, with flags added."""
    return partial(cli, "pretrain", *TINY_FLAGS, "--data.train", "digits", "--out", tmp_path / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny finished run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    flags = ("--data.train", "digits:split=train", "--data.val", "digits:split=test", "--out", str(out))
    assert main(["pretrain", *TINY_FLAGS, *flags]) == 0
    return out


def test_too_many_broken_pictures_stop_the_run_with_the_first_ten(cli, tmp_path):
    write_images(tmp_path / "images", 200, broken=30)
    words = ("pretrain", *TINY_FLAGS, "--data.train", tmp_path / "images", "--out", tmp_path / "run")
    code, out, err = cli(*words, "--train.batch_size", "230", "--data.max_bad_fraction", "0.05")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert "12 of 230 files cannot be read, more than data.max_bad_fraction 0.05 allows" in err
    assert sum(line.startswith("  broken_") for line in err.splitlines()) == 10
    assert "delete that list, or raise data.max_bad_fraction" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_stopped_by_a_signal_is_saved_and_says_so(tiny, tmp_path, monkeypatch, number, code):
    monkeypatch.setattr("nextblock.pretraining._monitors", lambda *_: [SignalAt(2, number)])
    stopped, out, err = tiny("--json")
    assert (stopped, json.loads(out)["stopped_by"]) == (code, number.name)
    assert f"stopped by {number.name} after step 2 of 3, saved; the same command resumes" in err
    run = tmp_path / "run"
    assert checkpoints(run) == ["step_00000002"]
    finished, out, err = tiny("--json")
    expected = {"run_dir": str(run), "step": 3, "total_steps": 3, "stopped_by": None, "num_bad": 0}
    expected |= {"losses": {"loss": metrics(run)[-1]["loss"]}}
    expected |= {"baselines": json.loads((run / "baselines.json").read_text())}
    assert finished == 0
    assert expected.items() <= json.loads(out).items()
    assert f"3 steps, in {run}" in err


class Stopped(RuntimeError):  # noqa: N818 - the name that users see
    signal = signal.SIGTERM


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyError("surprise"), 1, "KeyError: 'surprise'; run it again with --debug to see where"),
        (ValueError("of numpy"), 1, "ValueError: of numpy; run it again with --debug to see where"),
        (
            PermissionError(13, "Permission denied", "a/b"),
            2,
            "'a/b': Permission denied; check the path and its permissions",
        ),
        (OSError(5, "I/O error", "a/b"), 1, "OSError: [Errno 5] I/O error: 'a/b'; run it again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped("saved; run the same command again"), 143, "saved; run the same command again"),
    ],
)
def test_an_unforeseen_error_and_ctrl_c_are_one_line(tiny, monkeypatch, error, code, message):
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("nextblock.pretraining._monitors", broken)
    assert message in refused(tiny(), code=code)


def test_an_error_of_one_process_is_told_by_it_and_a_mistake_by_the_first_of_its_host(monkeypatch, capsys):
    monkeypatch.setattr("nextblock.cli.find_world", lambda: World(rank=1, size=2, local_rank=1))
    for error, told in (FileNotFoundError(2, "No such file or directory", "x.tar"), 1), (UsageError("no"), 0):

        def broken(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("nextblock.cli.data.sample", broken)
        code, _, err = call_cli(capsys, "data", "sample")
        assert (code, err.count("rank 1 on"), err.count("x.tar")) == (2, told, told)


@pytest.mark.parametrize("words", ["--help", "doctor é --json --workers 0 --out r.json"])
@pytest.mark.parametrize("output", [">&-", "| true", ""])
def test_an_output_that_is_closed_gone_or_of_few_letters_costs_nothing(words, output, tmp_path):
    write_images(tmp_path / "é", 1)
    command = ["bash", "-c", f"{sys.executable} -m nextblock {words} {output}"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "Error" not in done.stderr
    assert (tmp_path / "r.json").is_file() == words.startswith("doctor")
    assert output or done.stdout


def test_debug_shows_where_an_error_comes_from(cli):
    with pytest.raises(ValueError, match="did you mean"):
        cli("pretrain", "--out", "x", "--optim.lrr", "1", "--debug")


def test_another_batch_size_than_the_presets_is_reported_with_the_rate_in_proportion(tiny):
    _, _, err = tiny("--train.batch_size", "16")
    assert "batch 16 instead of 64: optim.lr stays 0.002. It is never scaled for you" in err
    assert "in proportion to the batch it would be 0.0005" in err
    # A rate of one's own was chosen knowingly.
    assert "never scaled" not in tiny("--train.batch_size", "16", "--optim.lr", "0.001", "--overwrite")[2]


def test_info_and_report_tell_of_a_run(cli, run):
    code, out, _ = cli("info", run, "--json")
    told = json.loads(out)
    assert (code, told["kind"], told["grid"], told["blocks"]) == (0, "model", [4, 4], 4)
    assert told["total_params"] == sum(tensor.numel() for tensor in weights(run, 3).values())
    assert (told["steps"], told["config"]["depth"]) == (3, 1)
    first = json.loads(cli("info", run / "checkpoints" / "step_00000003", "--json")[1])
    assert (first["steps"], first["loss"]) == (3, metrics(run)[-1]["loss"])
    code, out, _ = cli("info", run)
    assert code == 0
    assert "16 wide, 1 layer, 2 heads" in out
    assert "3 steps of 3 on digits:split=train" in out
    values = json.loads(cli("report", run, "--json")[1].splitlines()[-1])
    assert (values["final_step"], set(values["baselines"])) == (3, {"zero", "copy_previous"})


@pytest.mark.parametrize("word", ["plain", "it's two", "a\nb", "tab\t'\\n", "\x1b[2J", "\udcff\u200b"])
def test_a_quoted_word_can_be_pasted(word):
    assert quote(word).isprintable()
    told = subprocess.run(["bash", "-c", f"printf %s {quote(word)}"], capture_output=True, check=True)
    assert os.fsdecode(told.stdout) == word


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("xtra_k2.ckpt", "model, official XTRA"),
        ("causal_k1.ckpt", "model, official XTRA"),
        ("attentive_probe.ckpt", "classifier, official XTRA"),
        ("linear_probe.ckpt", "classifier, official XTRA"),
        ("aim_nano_backbone.pth", "encoder, official AIM"),
        ("aim_pretrain_nano_weights.safetensors", "model, official AIM"),
    ],
)
def test_info_tells_what_an_official_file_is_and_what_it_does_not_tell(cli, golden_dir, name, kind):
    code, out, _ = cli("info", golden_dir / name, "--json")
    told = json.loads(out)
    assert (code, f"{told['kind']}, {told['format']}", told["config"]["num_heads"]) == (0, kind, None)
    assert "give them: num_heads=" in told["assumed"]["num_heads"]
    told = json.loads(cli("info", golden_dir / name, "--num_heads", "3", "--json")[1])
    assert told["config"]["num_heads"] == 3
    assert "num_heads" not in told["assumed"]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("words.txt", 1, "cannot be read as a weight file"),
        ("nowhere", 2, "does not exist; known: a run"),
        ("word.txt", 2, "words.txt?"),
        ("xtra-b61", 2, "did you mean xtra-b16?"),
        (".", 1, "holds no model"),
    ],
)
def test_info_fails_on_what_holds_no_tensors(cli, tmp_path, name, code, message):
    (tmp_path / "words.txt").write_text("words")
    assert message in refused(cli("info", tmp_path / name), code=code)


def test_presets_are_listed_and_one_is_told_with_command_result_and_settings(cli):
    assert [preset["name"] for preset in json.loads(cli("presets", "--json")[1])] == list(PRESETS)
    code, out, _ = cli("presets", "--all")
    assert code == 0
    assert all(f"  {name}  " in out for name in PRESETS)
    assert max(map(len, out.splitlines())) <= 80
    assert len(cli("presets")[1].splitlines()) < 40
    code, out, _ = cli("presets", "xtra-b16-in1k")
    assert code == 0
    assert "nextblock pretrain --preset xtra-b16-in1k --data.train DIR --out RUN" in out
    assert "76.8 %" in out
    assert re.search(r"train.batch_size +2088\n", out)
    assert "model.embed_dim" not in out  # as by default


def test_predict_draws_a_runs_predictions_and_says_which_images_it_skipped(cli, run, tmp_path):
    write_images(tmp_path / "images", 2, broken=1)
    words = ("--data", tmp_path / "images", "--device", "cpu", "--json")
    code, out, _ = cli("predict", "--model", run, "--out", tmp_path / "p", *words)
    values = json.loads(out.splitlines()[-1])
    assert (code, len(values["rows"])) == (0, 2)
    assert Path(values["picture"]).is_file()
    (line,) = [line for line in out.splitlines() if "could not be read" in line]
    assert re.match(r"1 of 3 images could not be read: .*broken_00\.png", line)
    assert "broken_00.png" in values["bad"][0]["name"]
    assert values["bad"][0]["reason"]


def test_predict_in_python_takes_paths_and_refuses_unknown_and_missing_names(run, tmp_path):
    result = nextblock.predict(model=run, data="digits", out=tmp_path / "p", num_images=1, device="cpu")
    assert result.picture.is_file()
    with pytest.raises(ValueError, match=r"unknown setting 'images'; did you mean 'num_images'\?"):
        nextblock.predict(model=run, data="digits", out="p", images=1)
    with pytest.raises(ValueError, match=r"^out must be given$"):
        nextblock.predict(model=run, data="digits")


def test_python_and_the_command_line_make_the_same_run(run, tmp_path):
    written = yaml.safe_load((run / "config.yaml").read_text())
    nextblock.pretrain("xtra-tiny", out=tmp_path / "run", reporter=Quiet(), **written)
    assert (tmp_path / "run" / "config.yaml").read_text() == (run / "config.yaml").read_text()
    ours, theirs = weights(tmp_path / "run", 3), weights(run, 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sigterm_ends_a_process_with_143_after_saving(tmp_path):
    out = tmp_path / "run"
    words = ("--data.train", "digits", "--out", out, "--train.duration", "1000000st")
    command = [sys.executable, "-m", "nextblock", "pretrain", *TINY_FLAGS, *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in err
    assert checkpoints(out) == [f"step_{metrics(out)[-1]['step']:08d}"]
