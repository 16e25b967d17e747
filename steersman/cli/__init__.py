"""The command line: composes the four parts. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import os
import sys

from steersman.cli import bench, engines, judge, learn, listing, operate, serve  # noqa: F401  (they add their commands)
from steersman.cli.common import app
from steersman.runtime.errors import UserError

__all__ = ["app", "main", "with_address"]


def with_address(arguments: list[str]) -> list[str]:
    """`--ray` with the address `local` where none follows: typer knows no options with an optional value."""
    made: list[str] = []
    for i, argument in enumerate(arguments):
        made.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        if argument == "--ray" and following not in ("auto", "local") and ":" not in following:
            made.append("local")
    return made


def main() -> None:
    """The `steersman` command: a user's mistake is one sentence and exit code 2."""
    # Before numpy is loaded: episodes are played on all cores already, and results do not depend on their number.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    sys.argv = with_address(sys.argv)
    try:
        app()
    except UserError as error:
        print(f"steersman: {error}", file=sys.stderr)
        sys.exit(2)
