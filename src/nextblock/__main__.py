"""`python -m nextblock`."""

from __future__ import annotations

import sys

from nextblock.cli import main

if __name__ == "__main__":
    sys.exit(main())
