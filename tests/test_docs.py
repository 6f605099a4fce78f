"""The documentation: a strict build without a network, links, search, widths; commands and snippets run."""

from __future__ import annotations

import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import nextblock
from commands import blocks_of, commands_of, make_places, parse, run_shortened
from nextblock.cli.verbs import VERBS
from nextblock.config import RunConfig
from nextblock.settings import setting_types

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SOURCES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
PAGES = {path: path.read_text() for path in [*SOURCES, ROOT / "README.md"]}
CHROMIUM = Path("/usr/bin/chromium")

NOT_RUN = {
    r"hf:USER": "nothing is asked of the hub",
    r"timm:vit_(base|small)": "timm's weights are not fetched",
    r"(xtra|backbone)[\w-]*\.(ckpt|pth)": "official files; run by test_official_classifiers",
    r" suite (?!--list)": "the papers' data sets; small copies are run by test_suite",
    r"solar|files:train": "a package's photographs; run by test_solar_cells",
}
"""Commands of nextblock that are only read by its parser, and why."""
OF_OTHERS = {
    "make": "targets are looked up in the Makefile",
    "python": "benchmarks are looked up, and run by test_benchmarks",
    "torchrun": "what it starts is read; several processes are run by test_distributed",
    "srun": "what it starts is read; a queue is run by tests/slurm",
    "sbatch": "run by tests/slurm",
    "bsub": "LSF is not here",
    "apt-get": "the system's packages",
    "pip": "run by test_readme",
    "embedding-atlas": "a server of another package; the file's columns are tested by test_embed",
    "export": "a variable of the shell",
}
"""Commands of other programs, and why they are not run."""
SMALL = [
    ("digits:split=train", "TRAIN"),
    ("digits:split=test", "TEST"),
    (r" --devices \d+", ""),  # several processes are run by test_distributed
    ("--model.vocab_size 512", "--model.vocab_size 8"),
    ("--given_rows 0.25", "--given_rows 0.5"),
]
"""What is made smaller before a command runs."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages; a warning or a request to a network would have failed the build."""
    out = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out / "doctrees"), str(DOCS)]
    command, env = [sys.executable, *words, str(out / "html")], os.environ | nowhere
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, str]:
    return {path: path.read_text() for path in site.rglob("*.html")}


def ids_of(text: str) -> set[str]:
    return set(re.findall(r'\sid="([^"]+)"', text))


def test_every_link_inside_leads_somewhere(site, pages):
    ids = {path: {*ids_of(text), "top", ""} for path, text in pages.items()}
    wrong = []
    for path, text in pages.items():
        for link in re.findall(r'\s(?:href|src)="([^"]*)"', text):
            parts = urlsplit(html.unescape(link))
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or (target in ids and parts.fragment not in ids[target]):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert not wrong


def test_links_between_the_sources_work_where_they_are_read_as_files():
    links = {
        (path, link)
        for path in [*PAGES, DOCS / "first_hour.ipynb"]
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", path.read_text())
    }
    assert len(links) > 50
    assert not {(str(path), link) for path, link in links if not (path.parent / link).exists()}


def test_every_command_setting_and_public_name_has_an_entry(site, pages):
    ids = set().union(*map(ids_of, pages.values()))
    assert not {f"nextblock-{verb.replace(' ', '-')}" for verb in VERBS} - ids
    assert not {f"confval-{setting.name}" for setting in setting_types(RunConfig)} - ids
    assert not {f"nextblock.{name}" for name in nextblock.__all__} - ids
    assert "cmdoption-nextblock-probe-lr" in ids
    python = html.unescape(re.sub(r"<[^>]+>", "", pages[site / "reference" / "python.html"]))
    assert "images: Float[Tensor, 'b c h w']" in python


def test_every_extra_is_described():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = [line for line in (DOCS / "quickstart.md").read_text().splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == set(extras)


def test_settings_that_the_pages_name_exist():
    known = {setting.name for setting in setting_types(RunConfig)}
    name = r"`(?:--)?((?:model|data|optim|train|checkpoint|monitor)\.[a-z_]+)[ `]"
    named = set(re.findall(name, "".join(PAGES.values())))
    others = {"model.safetensors", "checkpoint.py", "optim.py", "data.py"}
    assert len(named) > 50
    assert not named - known - others


@pytest.fixture(scope="module")
def opened(site):
    """A page of a browser, the address of the site, and what was asked of other hosts or went wrong."""
    if not CHROMIUM.exists():
        pytest.skip("no chromium here")
    from playwright.sync_api import sync_playwright

    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address, wrong = f"http://127.0.0.1:{server.server_port}", []
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        page = browser.new_context().new_page()
        page.context.set_default_timeout(120_000)  # of a machine that is busy
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url),
        )
        yield page, address, wrong
        browser.close()
        server.shutdown()


@pytest.mark.parametrize("place", ["server", "files"])
def test_the_search_finds_a_word_without_another_host(place, opened, site):
    page, address, wrong = opened
    if place == "files":  # without extracts, which browsers do not read from files
        page, address = page.context.new_page(), site.as_uri()
    page.goto(f"{address}/search.html?q=quarantine.jsonl")
    page.wait_for_selector("#search-results li a:has-text('Training')")
    assert not wrong


def test_every_page_fits_a_telephone_and_a_wide_screen(opened, site, pages):
    page, address, wrong = opened
    too_wide = []
    for path in pages:
        page.goto(f"{address}/{path.relative_to(site)}", wait_until="domcontentloaded")
        for width in (400, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            if page.evaluate("document.documentElement.scrollWidth") > width:
                too_wide.append((path.name, width))
    assert len(pages) > 30
    assert not too_wide
    assert not wrong


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN)


COMMANDS = {path: commands_of(text) for path, text in PAGES.items()}
ALL_COMMANDS = sorted({one for commands in COMMANDS.values() for one in commands})
OURS = {
    path: [one for one in commands if one.startswith("nextblock ")] for path, commands in COMMANDS.items()
}


def runnable() -> list[Any]:
    """The pages with commands; the test of the README runs much of what is slow here."""
    quick = {"benchmarks", "planning", "several_gpus", "training", "use"}
    paths = [path for path in SOURCES if any(map(is_run, OURS[path]))]
    marks = {path: () if path.stem in quick else pytest.mark.slow for path in paths}
    return [pytest.param(path, marks=marks[path], id=path.stem) for path in paths]


def without_variables(command: str) -> list[str]:
    return [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]


def test_commands_of_other_programs_are_those_that_are_listed():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in ALL_COMMANDS:
        words = without_variables(command)
        assert words[0] in {"nextblock", *OF_OTHERS}, command
        if words[0] == "make":
            assert words[1] in targets, command
        if words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), command
        if words[0] in ("torchrun", "srun"):
            parse(command[command.index("nextblock ") :])


def test_every_command_is_understood_by_the_parser_and_a_misspelt_flag_would_be_found(capsys):
    commands = [one for one in ALL_COMMANDS if one.startswith("nextblock ")]
    assert len(commands) > 80
    for command in commands:
        parse(command)
    with pytest.raises(AssertionError, match="modell"):
        parse("nextblock knn --modell RUN --train TRAIN")


def test_every_reason_not_to_run_is_needed():
    assert not [one for one in NOT_RUN if not any(re.search(one, command) for command in ALL_COMMANDS)]
    assert not set(OF_OTHERS) - {without_variables(one)[0] for one in ALL_COMMANDS}


def test_the_quick_start_prints_what_the_readme_prints():
    (printed,) = re.findall(r"```\n(top-1.*?)```", PAGES[ROOT / "README.md"], flags=re.DOTALL)
    assert blocks_of(PAGES[DOCS / "quickstart.md"], "text") == [printed]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The places, with a probed run."""
    folder = tmp_path_factory.mktemp("places")
    make_places(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_shortened("nextblock pretrain --data.train DIR --out RUN")
        run_shortened("nextblock probe --model RUN --train TRAIN --test TEST --out RUN/probe")
    shutil.copytree(folder / "RUN", folder / "RUNS" / "first")
    return folder


@pytest.fixture
def places(trained, tmp_path, monkeypatch, coarse_pictures) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", runnable())
def test_the_commands_of_a_page_run_in_their_order(path, places, capsys):
    for command in filter(is_run, OURS[path]):
        run_shortened(command, SMALL)


WITH_PYTHON = {path: code for path, text in PAGES.items() if (code := blocks_of(text, "python"))}


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.stem)
def test_the_snippets_of_a_page_run_in_their_order(path, places, capsys):
    names: dict[str, object] = {}
    for code in WITH_PYTHON[path]:
        exec(code, names)
