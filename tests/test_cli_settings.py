"""The words of a command: what wins over what, what is refused, what a config file may hold, and help."""

import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml

import nextblock
from nextblock.cli import VERBS
from nextblock.presets import get_preset
from nextblock.settings import flatten, to_dict
from tiny_runs import call_cli, refused


@pytest.fixture
def cli(capsys):
    """`cli("info", "RUN")` -> exit code, standard output, standard error."""
    return partial(call_cli, capsys)


@pytest.fixture
def resolved(cli, tmp_path):
    """`resolved(words...)` -> the settings that a line means, by dotted name."""

    def call(*words: str) -> dict:
        code, out, err = cli("pretrain", "--out", "RUN", *words, "--print_config")
        assert (code, err) == (0, "")
        return flatten(yaml.safe_load(out))

    return call


@pytest.fixture
def files(tmp_path):
    """Two config files; the second contradicts the first in part."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("optim:\n  lr: 0.25\n  weight_decay: 0.75\n")
    second.write_text("optim: {lr: 0.5}\nmodel:\n  depth: 7\n")
    return str(first), str(second)


def test_flags_win_over_config_files_and_those_over_the_preset_whatever_the_order(resolved, files):
    preset, flag = ("--preset", "xtra-tiny"), "--optim.lr=0.125"
    config, more = ("--config", files[0]), f"--config={files[1]}"
    orders = (*preset, *config, more, flag), (flag, *config, more, *preset), (*config, flag, *preset, more)
    expected = {"preset": "xtra-tiny", "model.embed_dim": get_preset("xtra-tiny").config.model.embed_dim}
    expected |= {"optim.lr": 0.125, "optim.weight_decay": 0.75, "model.depth": 7}
    for words in orders:
        assert expected.items() <= resolved(*words).items()


def test_a_config_file_may_name_the_preset_and_a_flag_another(resolved, tmp_path):
    (tmp_path / "p.yaml").write_text("preset: xtra-tiny\nmodel: {depth: 3}\n")
    for words, preset, width in (((), "xtra-tiny", 128), (("--preset", "xtra-s16"), "xtra-s16", 384)):
        expected = {"preset": preset, "model.embed_dim": width, "model.depth": 3}
        assert expected.items() <= resolved("--config", tmp_path / "p.yaml", *words).items()


def test_what_print_config_prints_is_a_config_file_of_the_same_settings(cli, tmp_path, files):
    words = ("--out", "RUN", "--model.image_size", "[192, 256]", "--data.crop_scale", "[0.5, 1]")
    code, out, _ = cli("pretrain", "--preset", "xtra-s16", "--config", files[0], *words, "--print_config")
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    again = cli("pretrain", "--config", tmp_path / "printed.yaml", "--print_config")
    assert again == (0, out, "")


def test_a_verb_of_evaluation_takes_config_files_and_prints_its_settings(cli, tmp_path):
    (tmp_path / "grid.yaml").write_text("model: RUN\ntrain: digits\nlr: [1e-3, 1e-2]\nepochs: 3\n")
    (tmp_path / "other.yaml").write_text("epochs: 4\nheads: [linear]\n")
    words = ("--lr", "3e-3", "--out", "OUT", "--config", tmp_path / "grid.yaml", "--print_config")
    code, out, _ = cli("probe", "--config", tmp_path / "other.yaml", *words)
    assert code == 0
    expected = {"model": "RUN", "out": "OUT", "lr": [3e-3], "epochs": 3, "heads": ["linear"]}
    assert yaml.safe_load(out) | expected == yaml.safe_load(out)
    (tmp_path / "printed.yaml").write_text(out)
    assert cli("probe", "--config", tmp_path / "printed.yaml", "--print_config") == (0, out, "")
    error = refused(cli("knn", "--config", tmp_path / "grid.yaml"))
    assert "grid.yaml, line 3: unknown setting lr; see --help-all" in error


def test_without_images_or_a_run_there_is_nothing_to_train_on(cli, tmp_path):
    error = refused(cli("pretrain", "--out", tmp_path / "run"))
    assert f"nothing to train on, and {tmp_path / 'run'} is not a run to resume; name a directory" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("--data.train A --data.train B", "data.train", ["A", "B"]),
        ('--data.train C --data.train ["A","B"]', "data.train", ["A", "B"]),
        ('--data.train ["A","B"] --data.train C', "data.train", "C"),
        ('--data.train ["A","B"] --data.train C --data.train D', "data.train", ["C", "D"]),
        ("--data.train A --data.train null", "data.train", None),
        ("--data.train null --data.train A", "data.train", "A"),
        ("--data.train 5 --data.train=null2", "data.train", ["5", "null2"]),
        ("--data.train hf:X,split=D --data.train ü", "data.train", ["hf:X,split=D", "ü"]),
        ("--data.train [A,B]", "data.train", ["A", "B"]),
        ("--data.train 0x10", "data.train", "0x10"),
        ("--data.weights 0.8 --seed 3 --data.weights=0.2", "data.weights", [0.8, 0.2]),
        ("--data.weights [0.8,0.2]", "data.weights", [0.8, 0.2]),
        ("--data.weights 1", "data.weights", [1.0]),
        ("--data.weights 1 --data.weights auto", "data.weights", None),
        ("--data.workers auto", "data.workers", None),
        ("--optim.clip_grad none", "optim.clip_grad", None),
        ("--data.weights 0.8,0.2", "data.weights", [0.8, 0.2]),
        ("--data.val #h", "data.val", "#h"),
        ("--data.val [x]", "data.val", "[x]"),
        ("--data.val=-x", "data.val", "-x"),
        ("--model.image-size 32x64", "model.image_size", [32, 64]),
        ("--optim.betas 0.8 --optim.betas 0.9", "optim.betas", [0.8, 0.9]),
        ("--model.image_size 64 --model.image_size 32", "model.image_size", 32),  # no list: the last counts
        ("--train.precision BF16", "train.precision", "bf16"),
    ],
)
def test_values_of_a_flag_given_several_times_are_a_list_if_the_setting_is_one(
    resolved, words, name, expected
):
    assert resolved("--preset", "xtra-tiny", *words.split())[name] == expected


def test_null_is_refused_where_a_file_of_that_name_is_meant(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "null").mkdir()
    assert "write ./null" in refused(cli("pretrain", "--out", "x", "--data.val", "null"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrian", "unknown command 'pretrian'; did you mean 'pretrain'?"),
        ("xyz", "unknown command 'xyz'; known: pretrain, eval, probe, "),
        ("pretrain", "--out must be given"),
        ("info", "FILE must be given"),
        ("finetune --head linear", "--model, --out and --train must be given"),
        ("pretrain --out x --preset xtra-tny", "'xtra-tny'; did you mean 'xtra-tiny'?"),
        ("report nowhere", "nowhere does not exist"),
        ("pretrain --out x --optim.lr -1e-3", "optim.lr is '-1e-3'; it must be a number from"),
        ("knn --device gpu", "device is 'gpu'; did you mean cuda?"),
        ("probe --heads linear,attentiv", "heads is 'attentiv'; did you mean attentive?"),
        ("pretrain --preset xtra-tiny --data.train digits --out x --train.device cuda", "available: cpu"),
        ("pretrain --out x --data.weights 0.8 --data.weights x", "is 0.8,x; it must be a list of numbers"),
        ("pretrain --out x --optim.betas 0.9", "optim.betas is 0.9; it must be a list of 2 numbers"),
        ("pretrain --out x --data.weights --seed 3", "--data.weights needs a value"),
        ("pretrain --out x --seed 3 --data.train", "--data.train needs a value"),
        ("pretrain --out r --overwrite=yes", "--overwrite takes no value"),
        # A slip is answered with the flag that is meant.
        ("pretrain --out r --data d", "unknown setting --data; did you mean --data.train d?"),
        ("pretrain --out r --val d", "--data.val d?"),
        ("pretrain --out r --model.size small", "--preset small?"),
        ("pretrain --out r --train.epochs 3", "--train.duration 3ep?"),
        ("pretrain --out r --lr=3", "unknown setting --lr; did you mean --optim.lr?"),
        ("pretrain --out r --train.lr 1", "--optim.lr?"),
        ("pretrain --out r --model.imagesize 1", "--model.image_size?"),
        ("pretrain --model.patch 4", "--model.patch_size?"),
        ("pretrain --output_dir r", "--out r?"),
        ("pretrain --out r --zebra 1", "unknown setting --zebra; nextblock pretrain --help-all lists all"),
        ("probe --model r --data.train d", "--train?"),
        ("probe --preset xtra-tiny", "--model xtra-tiny?"),
        ("knn --model xtra-tiny --train digits", "xtra-tiny is a preset, not a model; train it first"),
        ("pretrain --out r --config xtra-tiny", "xtra-tiny is a preset; write --preset xtra-tiny"),
        # So is a word that no flag takes.
        ("pretrain --out r --data.train a b", "'b' is unexpected; write --data.train a --data.train"),
        ("pretrain --out r --model.image_size 32 64", "write --model.image_size 32,64"),
        ("knn --model r --k 1 20", "'20' is unexpected; write --k 1,20 or --k 1 --k 20"),
        ("convert a b --layers 1 2", "'2' is unexpected; write --layers 1,2 or --layers 1 --layers 2"),
        ("pretrain xtra-tyni --out r", "--preset xtra-tiny?"),
        ("pretrain --out r settings.yaml", "did you mean --config settings.yaml?"),
        ("plan H100", "did you mean --gpu H100?"),
        ("knn --model r d", "'d' is unexpected; did you mean --train d?"),
        ("convert a b c", "'c' is unexpected; see nextblock convert --help"),
    ],
)
def test_wrong_usage_is_told_with_code_2_and_what_to_type(cli, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told, (verb, *_) = refused(cli(*words.split())), words.split()
    assert message in told
    assert told.startswith(f"nextblock {verb}: " if verb in VERBS else "nextblock: ")


@pytest.mark.parametrize("words", ["--model.predictor null", "--model.image_size 100"])
def test_print_config_refuses_what_a_run_refuses(cli, words):
    plain = refused(cli("pretrain", "--out", "r", "--data.train", "digits", *words.split()))
    assert refused(cli("pretrain", *words.split(), "--print_config")) == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lrr: 1}", "c.yaml, line 1: unknown setting optim.lrr; did you mean optim.lr?"),
        ("out: r", "c.yaml, line 1: out cannot be set in a file; give it as --out on the command line"),
        ("\noptimm: {lr: 1}", "c.yaml, line 2: unknown setting optimm.lr; did you mean optim.lr?"),
        ("optim: {lr: fast}", "c.yaml, line 1: optim.lr is 'fast'; it must be a number from 0"),
        ("optim: [1", "c.yaml, line 1: not YAML: "),
        ("optim:\n\tlr: 1", "c.yaml, line 2: an odd space (U+0009)"),
        ("optim:\n  lr:\u00a01", "c.yaml, line 2: an odd space (U+00A0)"),
        ("", "has no settings"),
        ("seed", "has no settings"),
        ("seed: 1\nseed: 2", "c.yaml, line 2: seed is given twice (also line 1); keep one"),
        ("data:\n  val: #h", "line 2: data.val has no value (# begins a comment)"),
        ("data:\n  val: ~", "line 2: data.val is ~; write none"),
        ("optim: evil.Settings", "line 1: optim is a section"),
        ("data: {val: {a: 1}}", "unknown setting data.val.a"),
        ("data: {val: [{a: 1}]}", "data.val cannot hold `name: value`"),
        ("data: {val: !!python/name:os.system x}", "a value cannot begin with &, * or !"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "line 1: a value cannot begin with &"),
        ("seed: 010", "seed is '010'; it must be a whole number"),
        ("seed: 1\n---\nseed: 2", "not YAML: "),
    ],
)
def test_a_wrong_config_file_is_told_with_code_2(cli, tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    assert message in refused(cli("pretrain", "--out", "x", "--config", tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("\ufeffseed: 3", "seed", 3),
        ("data: {val: '~'}", "data.val", "/home/me"),
        ('data: {val: "null"}', "data.val", "null"),
        ("data: {val: null}", "data.val", None),
        ("data: {val: none, workers: auto}", "data.val", None),
        ("data: {val: 12:30}", "data.val", "12:30"),
        ("data: {train: [1, b]}", "data.train", ["1", "b"]),
        ("model: {image_size: [32, 64]}", "model.image_size", [32, 64]),
        ("optim: {lr: 1e-4}", "optim.lr", 1e-4),
        ("optim:\n  lr: 1\noptim:\n  end_lr: 0", "optim.lr", 1.0),
        ('{"optim": {"lr": 0.5}}', "optim.lr", 0.5),
    ],
)
def test_a_config_file_means_what_is_written(resolved, tmp_path, monkeypatch, content, name, expected):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    assert resolved("--preset", "xtra-tiny", "--config", tmp_path / "c.yaml")[name] == expected


@pytest.mark.parametrize(("content", "why"), [(None, "is not a file"), (b"\xff\xfes", "is not UTF-8")])
def test_a_config_file_that_cannot_be_read_is_named(cli, tmp_path, content, why):
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    assert f"c.yaml {why}" in refused(cli("pretrain", "--out", "x", "--config", tmp_path / "c.yaml"))


HELP = """
import sys
from nextblock.cli import main
for verb in sys.argv[1:]:
    assert main([*verb.split(), "--help-all"]) == 0
assert not {"torch", "timm", "torchvision", "matplotlib", "yaml", "rich"} & sys.modules.keys()
"""


def test_all_help_does_not_wait_for_torch_and_lists_every_setting_with_its_meaning():
    done = subprocess.run([sys.executable, "-c", HELP, *VERBS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in flatten(to_dict(get_preset("xtra-tiny").config)):
        assert f"--{name} " in done.stdout
    words = " ".join(done.stdout.split())
    assert "Image size in pixels: 64 (square), or rows and columns as 32,64 or 32x64. (default: 256)" in words
    assert "number of cores minus one, at most 8; 0: the main process. (default: auto)" in words


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_a_line_examples_that_are_understood_and_the_usual_settings(cli, verb):
    code, out, _ = cli(*verb.split(), "--help")
    about, _, *rest = out.splitlines()
    known = {*re.findall(r"^  (--[a-z_A-Z.]+)", cli(*verb.split(), "--help-all")[1], flags=re.MULTILINE)}
    assert (code, about, len(rest) <= 40) == (0, f"{VERBS[verb].about}.", True)
    for i, example in enumerate(VERBS[verb].examples):
        assert rest[i] == f"  nextblock {verb} {example}".rstrip()
        assert verb == "data" or set(re.findall(r" (--[a-z_.]+)", example)) <= known
    assert len(VERBS[verb].examples) == 3
    assert {f"--{name}" for name in VERBS[verb].usual.split()} <= known
    assert verb == "data" or rest[-1] == f"all settings: nextblock {verb} --help-all"


def test_help_lists_the_commands_in_80_columns(cli):
    assert cli("--version") == (0, f"nextblock {nextblock.__version__}\n", "")
    code, commands, _ = cli()
    assert (code, commands) == cli("--help")[:2] == cli("-h")[:2] == cli("help")[:2]
    assert max(map(len, commands.splitlines())) <= 80
    for verb in VERBS:
        assert (f"  {verb} " in commands) == (" " not in verb)
