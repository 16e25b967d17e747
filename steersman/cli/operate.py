"""A running gateway, through its admin API."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from steersman.cli.common import (
    ADMIN_URL,
    Admin,
    Place,
    app,
    console,
    policy_app,
    replica_app,
    show_list,
)
from steersman.runtime.errors import UserError

if TYPE_CHECKING:
    from steersman.runtime.admin.client import AdminClient


def _admin(url: str) -> AdminClient:
    from steersman.runtime.admin.client import AdminClient

    return AdminClient(url, os.environ.get("STEERSMAN_ADMIN_KEY"))


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, soft_wrap=True, markup=False)


@policy_app.command()
def push(
    policy: Annotated[str, typer.Argument(help="A run folder, a bundle, a heuristic, or a version that was pushed.")],
    place: Annotated[Place, typer.Option("--as", help="Decide all, decide a share, or only look on.")] = Place.CURRENT,
    share: Annotated[float | None, typer.Option(help="A canary's share of the requests; 0.1 by default.")] = None,
    admin: Admin = ADMIN_URL,
) -> None:
    """Deploy a policy on a running gateway; it is tested there before it takes a request."""
    _say(_admin(admin).push(policy, place.value, share))


@policy_app.command("list")
def list_policies(admin: Admin = ADMIN_URL) -> None:
    """List the policies that a gateway has, the last pushed first."""
    show_list(
        ("version", "deployed as", "pushed (UTC)", "what it is"),
        [
            (p["version"], ", ".join(p["places"]), p["pushed"].partition("+")[0], escape(p["summary"] or p["name"]))
            for p in _admin(admin).policies()
        ],
    )


@policy_app.command()
def rollback(admin: Admin = ADMIN_URL) -> None:
    """Let the policy decide again that did before."""
    _say(_admin(admin).rollback())


@policy_app.command()
def promote(admin: Admin = ADMIN_URL) -> None:
    """Let the canary decide all requests."""
    _say(_admin(admin).promote())


@policy_app.command()
def stop(
    place: Annotated[Place, typer.Argument(help="shadow or canary.")],
    admin: Admin = ADMIN_URL,
) -> None:
    """End a shadow or a canary."""
    if place is Place.CURRENT:
        raise UserError("the current policy cannot be stopped; push another one, or roll back")
    _say(_admin(admin).stop(place.value))


@replica_app.command()
def drain(name: Annotated[str, typer.Argument(help="The replica.")], admin: Admin = ADMIN_URL) -> None:
    """Send a replica no new requests; those in flight go on."""
    _say(_admin(admin).drain(name))


@replica_app.command()
def resume(name: Annotated[str, typer.Argument(help="The replica.")], admin: Admin = ADMIN_URL) -> None:
    """Send a drained replica requests again."""
    _say(_admin(admin).resume(name))


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one page; as where there is no terminal.")] = False,
    admin: Admin = ADMIN_URL,
) -> None:
    """Watch a running gateway: replicas, tenants, decisions, policies."""
    from steersman.runtime.admin.top import show, show_once

    client = _admin(admin)
    if once or not console.is_terminal:
        show_once(console, client.state)
        return
    try:
        show(console, client.state)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
