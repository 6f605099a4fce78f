"""What holds for the source tree as a whole: the direction of imports, sizes, and what importing costs."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

import nextblock

SRC = Path(__file__).parents[1] / "src" / "nextblock"

# A file may import those before it, and files of its own entry. A package stands for the files in it that
# have no entry of their own.
ORDER: Sequence[str] = """
    version errors logs launch atomic tables settings model_config config presets data.random data.decode
    data.sources.base data.sources.folder data.sources.archives data.sources.remote data.sources.datasets
    data.sources data.order data.augment data.workers data.loader
    data.subsets data.doctor data.pack data blocks targets models plan optim checkpoint
    interop train visualize report evaluate look serve pretraining cli __main__
""".split()  # noqa: SIM905 - one entry a line would take two screens

# No longer maintained, not exact, or with side effects on the user's process: chosen against.
UNWANTED = set("lightning pytorch_lightning pl_bolts torchdata hydra omegaconf cv2 ffcv webdataset".split())  # noqa: SIM905

HEAVY = {"torch", "torchvision", "torchcodec", "timm", "sklearn", "matplotlib", "tensorboard"}


def module_name(path: Path) -> str:
    """src/nextblock/data/loader.py -> data.loader; a package's __init__.py -> the package."""
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}
TEXTS = {name: path.read_text("utf-8") for name, path in FILES.items()}


def imports_of(name: str) -> list[tuple[int, str]]:
    package = ".".join(["nextblock", *FILES[name].relative_to(SRC).parts[:-1]])
    return list(imported_modules(ast.parse(TEXTS[name]), package))


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, also those in functions and under TYPE_CHECKING.

    `from a import b` yields `a.b`, as b may be a module. `package` is what a relative import starts from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def entry_of(name: str) -> str | None:
    """The longest entry of ORDER that a module, or what is imported from one, belongs to."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ORDER), None)


def against_the_order(imports: Iterable[tuple[int, str]], name: str) -> list[str]:
    """Imports that module `name` (without "nextblock.") must not make, as "module:line: what"."""
    here = entry_of(name)
    assert here is not None, f"give {name} a place in ORDER"
    wrong = []
    for line, target in imports:
        root, _, rest = target.partition(".")
        there = entry_of(rest)
        if root != "nextblock" or there == here or rest == "__version__":
            continue
        if there is None or ORDER.index(there) > ORDER.index(here):
            wrong.append(f"{name}:{line}: {target}")
    return wrong


def test_imports_go_up_the_order_only() -> None:
    # The package's own __init__ is lazy and names everything.
    assert not [entry for name in FILES if name for entry in against_the_order(imports_of(name), name)]


@pytest.mark.parametrize(
    ("statement", "name", "package", "is_wrong"),
    [
        ("import nextblock.cli", "data.loader", "nextblock.data", True),
        ("from nextblock import create_model", "cli.pretrain", "nextblock.cli", True),  # by the lazy __init__
        ("from ..train import loop", "data.loader", "nextblock.data", True),
        ("from nextblock.data.loader import Step", "data.order", "nextblock.data", True),
        ("from . import cli", "config", "nextblock", True),
        ("def f():\n    from nextblock.cli import main", "train.loop", "nextblock.train", True),
        ("if TYPE_CHECKING:\n    from nextblock.cli import x", "train.loop", "nextblock.train", True),
        ("import torch, nextblock.config", "cli", "nextblock.cli", False),
        ("from ..blocks import patchify", "models.vit", "nextblock.models", False),
        ("from nextblock import __version__", "checkpoint", "nextblock", False),
    ],
)
def test_an_import_against_the_order_is_found(statement, name, package, is_wrong) -> None:
    assert len(against_the_order(imported_modules(ast.parse(statement), package), name)) == is_wrong


def test_no_files_import_each_other_in_a_circle_not_even_within_functions() -> None:
    imports: dict[str, set[str]] = {}
    for name in FILES.keys() - {""}:
        inner = {t.removeprefix("nextblock.") for _, t in imports_of(name) if t.startswith("nextblock.")}
        inner = {target if target in FILES else target.rpartition(".")[0] for target in inner}
        imports[name] = inner & FILES.keys() - {name, ""}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_no_file_is_longer_than_500_lines() -> None:
    assert not {name: n for name, text in TEXTS.items() if (n := len(text.splitlines())) > 500}


def test_there_is_no_star_import_and_no_unwanted_package() -> None:
    found = [(name, *one) for name in FILES for one in imports_of(name)]
    assert not [one for one in found if one[2].endswith(".*") or one[2].partition(".")[0] in UNWANTED]


def test_a_missing_package_is_named_itself_as_no_index_has_the_extras() -> None:
    assert not [name for name, text in TEXTS.items() if "nextblock[" in text]


def test_every_public_name_resolves() -> None:
    assert len(set(nextblock.__all__)) == len(nextblock.__all__) > 0
    for name in nextblock.__all__:
        getattr(nextblock, name)


@pytest.mark.parametrize(
    "code", ["import nextblock", "from nextblock.cli import main; assert main(['--help']) == 0"]
)
def test_importing_nextblock_and_help_load_nothing_heavy(code) -> None:
    code += f"; import sys; assert not {HEAVY} & sys.modules.keys()"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
