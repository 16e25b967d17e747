"""The gateway, its keys and its audit log."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from steersman.cli.common import (
    Sets,
    app,
    console,
    keys,
)


class LogFormat(StrEnum):
    """How the gateway tells of events."""

    TEXT = "text"
    JSON = "json"


@app.command()
def serve(
    config: Annotated[
        str | None, typer.Option("--config", help="A gateway's name or file; the options below go before its keys.")
    ] = None,
    fleet: Annotated[
        str | None, typer.Option("--fleet", help="A fleet's name or file, with backends. [default: local]")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="A run folder, a bundle, or a heuristic. [default: jsed]")
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(help="The heuristic that decides when the policy cannot. [default: least-requests]"),
    ] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", help="Where tenants and their SLOs are read from. [default: default]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: 8080]", min=0, max=65535)] = None,
    ext_proc: Annotated[
        bool, typer.Option("--ext-proc", help="Pick endpoints for Envoy, too, on ext_proc.port. [default: 9002]")
    ] = False,
    journal: Annotated[
        Path | None, typer.Option(help="Record decisions and outcomes, for train and evaluate.", metavar="DIR")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write what is served under training's names.", metavar="DIR")
    ] = None,
    log_format: Annotated[
        LogFormat | None, typer.Option("--log-format", help="How events are told on standard error. [default: text]")
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request.")] = False,
    sets: Sets = None,
) -> None:
    """Run the gateway: an OpenAI-compatible server in front of the fleet, the policy deciding every request."""
    from steersman.agents.policies import heuristic, is_path, serving
    from steersman.runtime.config import apply_sets, read_yaml, validate
    from steersman.runtime.configs import find_config
    from steersman.runtime.deployment.store import PolicyStore
    from steersman.runtime.errors import UserError
    from steersman.runtime.fleet import load_fleet
    from steersman.runtime.gateway import GatewayConfig, GatewayTenant, Policies
    from steersman.runtime.gateway import serve as run_gateway
    from steersman.runtime.log import line
    from steersman.runtime.tenant import Tenant
    from steersman.runtime.workload import load_workload

    path = None if config is None else find_config("gateways", config)
    given = {"fleet": fleet, "policy": policy, "fallback": fallback, "workload": workload, "host": host, "port": port}
    values = {} if path is None else read_yaml(path)
    values |= {key: value for key, value in given.items() if value is not None}
    if ext_proc:
        values.setdefault("ext_proc", {})
    if journal is not None:
        values["journal"] = {**(values.get("journal") or {}), "folder": str(journal)}
    log = {} if log_format is None else {"format": log_format.value}
    if log or access_log:
        values["log"] = {**(values.get("log") or {}), **log, **({"access": True} if access_log else {})}
    settings = validate(GatewayConfig, apply_sets(values, sets or []), "serve" if path is None else str(path))
    tenants = settings.tenants or {
        name: GatewayTenant(**tenant.model_dump(include=set(Tenant.model_fields)))
        for name, tenant in load_workload(find_config("workloads", settings.workload)).tenants.items()
    }
    served = load_fleet(find_config("fleets", settings.fleet))
    kept_in = None if settings.admin is None else settings.admin.policies
    store = PolicyStore(kept_in, lambda spec: heuristic(spec).bind())
    bundle = Path(settings.policy) if is_path(settings.policy) else None
    first = store.prepare_heuristic(settings.policy) if bundle is None else store.prepare_path(bundle)
    policies = Policies(store, first, bundle)
    board = None
    if tensorboard is not None:
        from steersman.training.live import LiveBoard

        board = LiveBoard(tensorboard)
    try:
        code = run_gateway(
            settings,
            served,
            tenants,
            policies,
            serving(settings.fallback),
            board=board.write if board else None,
        )
    except UserError as error:
        if settings.log.format == "text":
            raise
        print(line(settings.log, "failed", str(error), logging.ERROR), file=sys.stderr)
        code = 2
    if board is not None:
        board.close()
    raise typer.Exit(code)


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose requests it sends.")],
    file: Annotated[Path, typer.Option("--file", help="The gateway's key file; made where there is none.")] = Path(
        "keys.yaml"
    ),
) -> None:
    """Make an API key, keep its hash, and print it: it is never shown again."""
    from steersman.runtime.gateway.keys import add_key

    print(add_key(file, name, tenant))
    # Beside the key, not after it: KEY=$(steersman keys add …) is what scripts do.
    print(f"only its hash is kept, in {file}; take the entry out there to revoke it", file=sys.stderr)


@app.command()
def audit(
    files: Annotated[list[Path], typer.Argument(help="The files of one audit log, in any order.")],
) -> None:
    """Check that an audit log is whole and unchanged, and that no request went where its data may not go."""
    from steersman.runtime.gateway.audit import check

    found = check(files)
    console.print(
        f"{found.lines} decisions on requests with a rule, {found.dispatched} dispatched, chain unbroken; "
        f"{found.violations} where the data may not go",
        highlight=False,
    )
    raise typer.Exit(1 if found.violations else 0)
