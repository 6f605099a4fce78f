"""`nextblock serve`: the page, until Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.arguments import Parser, parse_settings
from nextblock.cli.output import end_with_json, say
from nextblock.look.settings import ServeSettings


def run(argv: Sequence[str]) -> int:
    """Load the model, serve its page; ends by a signal only."""
    # The model may come first, without its flag.
    argv = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    values, is_json = parse_settings(Parser("serve"), ServeSettings, argv)

    from nextblock.serve.server import serve

    def tell(url: str) -> None:
        say(f"Open {url} in a browser. Ctrl-C ends.")
        if is_json:
            end_with_json({"url": url})

    serve(ServeSettings(**values), tell)
    return 0
