"""``dmq-ao`` in the test process: what several test files ask of it."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from dmq_ao.cli.commands import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object) -> Any:
    """The one JSON document on stdout."""
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure(code: int, *arguments: object) -> str:
    """Stderr of a command that fails: nothing on stdout, no traceback."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())
