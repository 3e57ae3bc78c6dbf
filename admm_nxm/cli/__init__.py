"""The command line ``admm-nxm``; it needs the extra ``cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..checks import missing

_OF_THE_EXTRA = {"click", "rich", "typer"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, or those of the process, and return the exit status."""
    try:
        from .app import run
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_THE_EXTRA:
            raise
        print(f"admm-nxm: error: {missing(f'the command line needs {package}', 'cli')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the imports take a second or two
        print("admm-nxm: error: interrupted", file=sys.stderr)
        return 130
    return run(sys.argv[1:] if argv is None else argv)
