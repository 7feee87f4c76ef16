"""``dmq-ao``: the entry of the command line, which says how to install what it needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; ``dmq_ao.commands`` holds the commands."""
    try:
        from dmq_ao.commands import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit('error: the command line needs typer; install it with: pip install "dmq_ao[cli]"')
    app()
