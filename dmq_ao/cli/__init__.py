"""``dmq-ao``: the command line; its entry says how to install what it needs, and is importable without that."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; ``cli.commands`` holds the commands."""
    try:
        from dmq_ao.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit('error: the command line needs typer; install it with: pip install "dmq_ao[cli]"')
    app()
