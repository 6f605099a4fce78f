"""`python -m nextblock.bench.worker module:function JOB`: call the function with the job, print its answer.

The last line of the output is one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys

__all__ = ["main"]


def main() -> None:
    """Do the job that the command line names."""
    module, _, name = sys.argv[1].partition(":")
    answer = getattr(importlib.import_module(module), name)(json.loads(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
