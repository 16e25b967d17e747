"""What the commands share: the applications that they join, options, and the console."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train schedulers for LLM inference by reinforcement learning, and run them.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
app.add_typer(bench, name="bench")
policy_app = typer.Typer(no_args_is_help=True, help="Push policies to a running gateway, and take them back.")
app.add_typer(policy_app, name="policy")
replica_app = typer.Typer(no_args_is_help=True, help="Drain a running gateway's replicas.")
app.add_typer(replica_app, name="replica")
keys = typer.Typer(no_args_is_help=True, help="API keys of the gateway's tenants.")
app.add_typer(keys, name="keys")
console = Console(width=None if sys.stdout.isatty() else 160)  # a file or a pipe has no width of its own
Traces = Annotated[
    Path | None,
    typer.Option("--traces", envvar="STEERSMAN_TRACES", help="Folder with trace files.", metavar="DIR"),
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Change a key: key.path=value.", metavar="KEY=VALUE")]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="A heuristic (`steersman policies`), `name?key=value`, a run folder or a bundle."),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Play episodes on a Ray cluster; without an address on one of this machine's cores, or of $RAY_ADDRESS.",
        metavar="[ADDRESS]",
    ),
]
JournalOption = Annotated[
    Path | None, typer.Option("--journal", help="A gateway's journal: replay what it recorded.", metavar="DIR")
]
WorkloadOption = Annotated[str, typer.Option("--workload", help="A workload's name or file.")]
FleetOption = Annotated[str, typer.Option("--fleet", help="A fleet's name or file.")]
Admin = Annotated[
    str, typer.Option("--admin", envvar="STEERSMAN_ADMIN", help="The gateway's admin port.", metavar="URL")
]
ADMIN_URL = "http://127.0.0.1:8081"


class Place(StrEnum):
    """What a pushed policy does."""

    CURRENT = "current"
    SHADOW = "shadow"
    CANARY = "canary"


class Part(StrEnum):
    """Parts of a trace."""

    TRAIN = "train"
    HELD_OUT = "held-out"


def show_list(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
