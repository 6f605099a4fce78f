"""`nextblock convert`: weights from one format to another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from nextblock.cli.output import end_with_json
from nextblock.errors import UsageError

if TYPE_CHECKING:
    from nextblock.cli.arguments import Parser

ABOUT = (
    "Read a run, a checkpoint or weights of any known format, and write them in another. DST is a path where "
    "nothing is yet, or hf:USER/NAME, a repository of the Hugging Face hub (nextblock, timm)."
)


def run(argv: Sequence[str]) -> int:
    """Parse the words, convert, print one line of what was written."""
    options = _parser().parse(argv)

    from nextblock.interop.convert import convert

    done = convert(
        options.src,
        options.dst,
        options.to,
        image_size=options.image_size,
        layers=options.layers,
        attention=options.attention,
        head=options.head,
        num_heads=options.num_heads,
        probe_layers=_probe_layers(options.probe_layers),
        norm_eps=options.norm_eps,
        license=options.license,
        origin=options.origin,
    )
    checked = "" if done.difference is None else f", onnxruntime within {done.difference:.0e} of torch"
    sys.stdout.write(f"{done.to}: {done.place} ({done.num_bytes / 1e6:.1f} MB{checked})\n")
    if options.json:
        end_with_json(done._asdict())
    return 0


def _parser() -> Parser:
    from nextblock.cli.arguments import Parser
    from nextblock.config import Attention

    parser = Parser("convert", ABOUT)
    add = parser.add_argument
    add("src", type=str, help="run directory, weight file, timm directory, timm:NAME or hf:USER/NAME[/FILE]")
    add("dst", type=str, help="where to write: a new path, or hf:USER/NAME")
    add(
        "--to",
        type=Literal["nextblock", "timm", "onnx"] | None,
        default=None,
        help="the format to write; default: onnx for DST.onnx, else nextblock",
    )
    size = int | tuple[int, int] | None
    add(
        "--image_size",
        type=size,
        default=None,
        help="pixels, or [rows,columns]: of AIM's images; timm, onnx: if another",
    )
    several = tuple[int, ...] | None
    add(
        "--layers", type=several, default=None, help="onnx: layers to give out as well; give it once for each"
    )
    add("--attention", type=Attention | None, default=None, help="onnx: native (default), causal or full")
    add("--head", type=str | None, default=None, help="file of a classifier's head that SRC lacks (AIM)")
    add("--num_heads", type=int | None, default=None, help="the encoder's, where the file is silent")
    add(
        "--probe_layers",
        type=tuple[str, ...] | None,
        default=None,
        help="layers that a head averages, where its file is silent (AIM): last, best, or one for each",
    )
    add("--norm_eps", type=float | None, default=None, help="epsilon of the norms, of AIM files")
    add("--license", type=str | None, default=None, help="licence of the weights, for the model card")
    add("--origin", type=str | None, default=None, help="where the weights come from, for the model card")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def _probe_layers(words: Sequence[str] | None) -> Literal["last", "best"] | tuple[int, ...] | None:
    """Layers as words: "last" or "best" alone, or numbers."""
    if words is None:
        return None
    if len(words) == 1 and words[0] in ("last", "best"):
        return "last" if words[0] == "last" else "best"
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--probe_layers {' '.join(words)}: give last, best, or numbers of layers from 0")
    return tuple(map(int, words))
