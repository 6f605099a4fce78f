"""CPU seconds to load XTRA-B/16 from safetensors, against building a model and overwriting its weights."""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common import Row, median_of, parse, report, take_turns
from nextblock import create_model, load
from nextblock.checkpoint import save_model


def time_load(path: Path, name: str, *, plainly: bool) -> dict[str, Any]:
    """CPU seconds, and whether the model has the weights of the file."""
    started_s = time.process_time()
    if plainly:
        model = create_model(name)
        model.load_state_dict(load_file(path))
    else:
        model = load(path)
    seconds, weights, expected = time.process_time() - started_s, model.state_dict(), load_file(path)
    is_same = all(torch.equal(weights.pop(name), value) for name, value in expected.items()) and not weights
    return {"cpu_s": [seconds], "same": is_same}


def main() -> None:
    """Measure both ways and print how they compare."""
    options = parse(__doc__)
    name = "xtra-tiny" if options.quick else "xtra-b16"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(path, create_model(name))
        variants = {way: partial(time_load, path, name, plainly=way == "plain") for way in ("ours", "plain")}
        found = take_turns(variants, options)
    is_same = all(run["same"] for runs in found.values() for run in runs)
    if not is_same:
        sys.exit("no ratio: a model does not have the weights of its file")
    ours_s, plain_s = (median_of(runs, "cpu_s") for runs in found.values())
    row = Row(f"{name}, CPU seconds", ours_s, plain_s, "s", plain_s / ours_s, "at most 0.5 s")
    report("load", options, [row], same_weights=is_same)


if __name__ == "__main__":
    main()
