"""What holds for the source tree as a whole: the direction of imports, sizes, and what importing costs."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
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

MAX_FILE_LINES = 500


def source_files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def module_name(path: Path) -> str:
    """src/nextblock/data/loader.py -> data.loader; a package's __init__.py -> the package."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def imports_against_the_order(tree: ast.AST, name: str, package: str) -> list[str]:
    """Imports that module `name` (without "nextblock.") must not make, as "line: what"."""
    here = entry_of(name)
    assert here is not None, f"give {name} a place in ORDER"
    wrong = []
    for line, target in imported_modules(tree, package):
        root, _, rest = target.partition(".")
        there = entry_of(rest)
        if root != "nextblock" or there == here or rest == "__version__":
            continue
        if there is None or ORDER.index(there) > ORDER.index(here):
            wrong.append(f"{line}: {target}")
    return wrong


def heavy_modules_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running `code`."""
    report = f"import json, sys; print(json.dumps(sorted({HEAVY} & sys.modules.keys())), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


# ------------------------------------------------------------------------------------------- the source tree


def test_imports_go_up_the_order_only() -> None:
    wrong = []
    for path in source_files():
        name = module_name(path)
        if name == "":  # the package's own __init__ is lazy and names everything
            continue
        package = ".".join(["nextblock", *path.relative_to(SRC).parts[:-1]])
        found = imports_against_the_order(ast.parse(path.read_text("utf-8")), name, package)
        wrong += [f"{path.relative_to(SRC)}:{entry}" for entry in found]
    assert not wrong, "imports that go down the list:\n" + "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    """Not even within functions."""
    files = {module_name(path): path for path in source_files()}
    imports: dict[str, set[str]] = {}
    for name, path in files.items():
        if name:
            package = ".".join(["nextblock", *path.relative_to(SRC).parts[:-1]])
            found = (t for _, t in imported_modules(ast.parse(path.read_text("utf-8")), package))
            inner = {t.removeprefix("nextblock.") for t in found if t.startswith("nextblock.")}
            inner = {target if target in files else target.rpartition(".")[0] for target in inner}
            imports[name] = inner & files.keys() - {name, ""}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {
        str(path.relative_to(SRC)): len(path.read_text("utf-8").splitlines()) for path in source_files()
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_FILE_LINES}


def test_there_is_no_star_import_and_no_unwanted_package() -> None:
    found = [
        f"{path.relative_to(SRC)}:{line}: {target}"
        for path in source_files()
        for line, target in imported_modules(ast.parse(path.read_text("utf-8")), "nextblock")
        if target.endswith(".*") or target.partition(".")[0] in UNWANTED
    ]
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------ the public names, their cost


def test_every_public_name_resolves() -> None:
    assert len(set(nextblock.__all__)) == len(nextblock.__all__) > 0
    for name in nextblock.__all__:
        getattr(nextblock, name)


def test_importing_nextblock_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import nextblock") == set()


def test_help_loads_nothing_heavy() -> None:
    assert heavy_modules_after("from nextblock.cli import main; assert main(['--help']) == 0") == set()


# ------------------------------------------------------------------------ the checks find what they look for


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
    assert len(imports_against_the_order(ast.parse(statement), name, package)) == is_wrong


def test_a_missing_package_is_named_itself_as_no_index_has_the_extras():
    assert not [path.name for path in source_files() if "nextblock[" in path.read_text(encoding="utf-8")]
