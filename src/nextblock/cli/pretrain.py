"""`nextblock pretrain`: train on any images, or resume a run, in one process or many."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from nextblock.cli.arguments import Parser, parse_run
from nextblock.cli.output import end_with_json
from nextblock.launch import find_world, launch
from nextblock.settings import Count


def run(argv: Sequence[str]) -> int:
    """Parse the words and train; return 128 + n if signal n stopped the run, which is saved."""
    parser = Parser("pretrain")
    add = parser.add_argument
    add("--out", type=str, required=True, help="run directory; the same command, or --out alone, resumes it")
    add("--overwrite", action="store_true", help="start over if --out holds another run")
    add("--devices", type=Count | None, help="processes on this machine, one for each GPU (or CPU core)")
    config, options = parse_run(parser, [*_recorded_settings(argv), *argv])
    if options.devices is not None:
        return launch("pretrain", argv, options.devices, config.train.device)

    from nextblock.pretraining import pretrain

    result = pretrain(config, out=options.out, overwrite=options.overwrite)
    if options.json and find_world().rank == 0:
        end_with_json({**vars(result), "run_dir": str(result.run_dir), "warning": result.warning})
    return 0 if result.is_finished else 128 + signal.Signals[str(result.stopped_by)]


def _recorded_settings(argv: Sequence[str]) -> list[str]:
    """Words that load the settings of the run in --out; the other flags override them."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if "--out" not in words[:-1] or {"--preset", "--config"} & set(words):
        return []
    out = Path(words[words.index("--out") + 1])
    if "--data.train" in words:  # the run's images, perhaps moved, or a new run
        from nextblock.train.run_dir import recorded_config

        if "--overwrite" in words or recorded_config(out) is None:
            return []
    return ["--config", str(out / "config.yaml")] if (out / "config.yaml").is_file() else []
