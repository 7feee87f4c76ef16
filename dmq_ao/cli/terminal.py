"""How a command speaks: its result to stdout, all else to stderr; errors in one line, other libraries kept quiet."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Any

import typer
import typer.core

from dmq_ao.config import UnsupportedByBackend

_debugging: ContextVar[bool] = ContextVar("dmq_ao.debug", default=False)
_WARNINGS = "PYTHONWARNINGS"
FAILURE, INTERRUPTED = 1, 130


class Format(str, Enum):
    """What goes to stdout."""

    HUMAN = "human"
    JSON = "json"


def say(text: str) -> None:
    """A line of progress, to stderr."""
    typer.echo(text, err=True)


def emit(document: Mapping[str, Any], render: Callable[[], str], form: Format) -> None:
    """The result, to stdout: one JSON document, or the text that ``render`` makes of it."""
    from dmq_ao.evaluation.report import json_ready

    if form is Format.JSON:
        typer.echo(json.dumps(json_ready(document), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo(render())


def debug(value: bool) -> bool:
    """Callback of ``--debug``: tracebacks, and the warnings and loading bars of all libraries."""
    if value:
        _debugging.set(True)
        logging.disable(logging.NOTSET)
        warnings.simplefilter("default")
        os.environ.pop(_WARNINGS, None)
    return value


def debugging() -> bool:
    """Whether the command that runs was given ``--debug``."""
    return _debugging.get()


def read_prompts(texts: list[str] | None) -> list[str]:
    """Callback of ``--prompt``: texts as they are, and in the place of ``@FILE`` its lines."""
    prompts: list[str] = []
    for text in texts or []:
        prompts += _lines(Path(text[1:])) if text.startswith("@") else [text]
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read as text: {error}") from error
    if not any(lines):
        raise typer.BadParameter(f"{file} is empty; write one prompt a line")
    return [line for line in lines if line]


class Commands(typer.core.TyperGroup):
    """A group whose commands fail with one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit with 1 when it fails, 130 when it is interrupted."""
        with _quiet():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                raise
            except (ValueError, TypeError, OSError, ImportError) as error:
                if debugging():
                    raise
                say(f"error: {_line(error)}")
                raise typer.Exit(FAILURE) from error
            except KeyboardInterrupt:
                say("interrupted")
                raise typer.Exit(INTERRUPTED) from None


def _line(error: Exception) -> str:
    """The message; of other libraries' errors in one line, and with the type where there are no words."""
    text = str(error) if isinstance(error, UnsupportedByBackend) else " ".join(str(error).split())
    return text or type(error).__name__


@contextmanager
def option_values(hint: str | None = None) -> Iterator[None]:
    """What is wrong in here is wrong with the options: usage errors, exit code 2. Typed errors pass."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise typer.BadParameter(str(error), param_hint=hint) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, neither logged nor raised, while a command runs, also of its processes; ``--debug`` lifts it."""
    before, of_processes = logging.root.manager.disable, os.environ.get(_WARNINGS)
    token = _debugging.set(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ[_WARNINGS] = "ignore"
        try:
            yield
        finally:
            _debugging.reset(token)
            logging.disable(before)
            os.environ.pop(_WARNINGS, None)
            if of_processes is not None:
                os.environ[_WARNINGS] = of_processes
