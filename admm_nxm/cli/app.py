"""The application: its commands, and how errors become one line and an exit status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..checks import missing
from .commands import pack, report, unpack, verify
from .console import Result, show, silence
from .errors import InputError, reason_of
from .evaluate import evaluate
from .prune import prune
from .signals import Ended, ending
from .train import train

NAME = "admm-nxm"
BAD_INPUT, DEFECT, INTERRUPTED, CLOSED_PIPE = 2, 70, 130, 141
# ClickException, wherever this typer has it from.
_USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_SPELLED = {  # what messages of the package call otherwise than the command line does
    "overwrite=True": "--overwrite",
    ', or all such weights with ineligible="skip"': "",
    " or pass a state dict": "",
    "select={r'.*\\.weight': '2:4'}": r"--select '.*\.weight=2:4'",
}

app = typer.Typer(
    name=NAME,
    add_completion=False,
    rich_markup_mode=None,  # plain help, also where it is piped
    pretty_exceptions_enable=False,
    help="Prune Transformers to N:M sparsity, and check, measure and pack the result.",
    epilog="Exit status: 0 fine, 1 the pattern is violated, 2 bad input, 70 a defect of the program, 130 interrupted, "
    "129 and 143 ended by SIGHUP and SIGTERM. Any command takes --traceback.",
)
for name, command in {
    "train": train,
    "eval": evaluate,
    **{c.__name__: c for c in (verify, report, prune, pack, unpack)},
}.items():
    app.command(name)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        import torch

        from .._version import __version__

        typer.echo(f"{NAME} {__version__} (torch {torch.__version__}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run a command, print its result or what went wrong, and return the exit status."""
    args = list(arguments) or ["--help"]
    with_traceback = "--traceback" in args
    args = [argument for argument in args if argument != "--traceback"]
    as_json = "--json" in args and "--help" not in args
    out = sys.stdout
    try:
        # Whatever libraries print must not get between the reader and the one object.
        kept_apart = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with ending(), contextlib.nullcontext() if with_traceback else silence(), kept_apart:
            command = typer.main.get_command(app)
            with command.make_context(NAME, args) as context:
                result: Result = command.invoke(context)
        show(result, out, as_json=as_json)
        return result.status
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        message, status = "interrupted", INTERRUPTED
    except Ended as end:
        message, status = f"ended by {end.signal.name}", 128 + end.signal
    except _USAGE_ERROR as error:
        path = getattr(getattr(error, "ctx", None), "command_path", NAME)
        reason = " ".join(str(error.format_message()).split()).rstrip(".")  # type: ignore[attr-defined]
        message, status = f"{reason}; see {path} --help", BAD_INPUT
    except (InputError, ValueError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            return _close(out)
        message, status = _mendable(error), BAD_INPUT
        if with_traceback:
            traceback.print_exc()
    except Exception as error:
        what = f"{type(error).__name__}: {reason_of(error)}"
        message, status = f"unexpected {what}; please report it, with what --traceback adds to this", DEFECT
        if with_traceback:
            traceback.print_exc()
    try:
        print(f"{NAME}: error: {message}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": message, "status": status}), file=out, flush=True)
    except BrokenPipeError:
        return _close(out)
    except OSError:  # the terminal is gone, as after SIGHUP; the status is all that can be told
        _close(sys.stderr)
        _close(out)
    return status


def _mendable(error: Exception) -> str:
    message = reason_of(error)
    for ours, spelled in _SPELLED.items():
        message = message.replace(ours, spelled)
    if isinstance(error, ImportError) and "pip install" not in message:
        message = missing(message, "cli")
    return message


def _close(stream: Any) -> int:
    """Make sure that nothing is written to a pipe that nobody reads, not even when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return CLOSED_PIPE
