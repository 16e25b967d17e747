"""`steersman top`: a gateway's state as a page of the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from steersman.runtime.errors import UserError

State = Mapping[str, Any]
EVERY_S = 1.0
EVENTS = 6


def show_once(console: Console, ask: Callable[[], State]) -> None:
    """Print one page."""
    console.print(page(ask(), None, 0.0), highlight=False)


def show(console: Console, ask: Callable[[], State], every_s: float = EVERY_S) -> None:
    """Show pages until interrupted. A gateway that does not answer for a while is waited for.

    Raises:
        UserError: it does not answer the first time.
    """
    before, asked_s = ask(), time.monotonic()
    with Live(page(before, None, 0.0), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            try:
                state, now_s = ask(), time.monotonic()
            except UserError as error:
                live.update(Group(page(before, None, 0.0), Text(f"\n{error}", style="red")), refresh=True)
                continue
            live.update(page(state, before, now_s - asked_s), refresh=True)
            before, asked_s = state, now_s


def page(state: State, before: State | None, elapsed_s: float) -> RenderableType:
    """The page of `state`; rates are since `before`, `elapsed_s` seconds ago, or since the gateway started."""
    policies = state["policies"]
    parts: list[RenderableType] = [_head(state, before, elapsed_s), _policies(policies)]
    if policies["shadow"] is not None:
        parts.append(_shadow(policies["shadow"]))
    if policies["canary"] is not None:
        parts.append(_canary(policies["canary"]))
    parts += [Text(), _replicas(state["replicas"]), Text(), _tenants(state, before, elapsed_s)]
    if policies["events"]:
        parts += [Text(), *(_event(*event) for event in policies["events"][-EVENTS:])]
    return Group(*parts)


def _rate(state: State, before: State | None, elapsed_s: float, count: Callable[[State], float]) -> float:
    if before is None or elapsed_s <= 0:
        return count(state) / max(1e-9, float(state["uptime_s"]))
    # A gateway that was started anew counts from zero.
    return max(0.0, count(state) - count(before)) / elapsed_s


def _head(state: State, before: State | None, elapsed_s: float) -> Text:
    rate = _rate(state, before, elapsed_s, lambda s: float(s["policies"]["decisions"]))
    inflight = sum(replica["inflight"] for replica in state["replicas"])
    return Text.assemble(
        ("steersman ", "bold"),
        f"{state['version']}, up {_duration(state['uptime_s'])}: ",
        (f"{rate:.1f} decisions/s", "bold"),
        f", {inflight} in flight, {state['held']} held",
    )


def _policies(policies: Mapping[str, Any]) -> Text:
    fallbacks = ", ".join(f"{count} {reason}" for reason, count in sorted(policies["fallbacks"].items()))
    previous = f", before it {policies['predecessors'][-1]}" if policies["predecessors"] else ""
    current = next((a for a in policies["arms"] if (a["version"], a["role"]) == (policies["current"], "current")), None)
    failed = f" (at last: {current['last_failure']})" if current and current["last_failure"] else ""
    took = f", {1e6 * current['decision_s']['p50_s']:.0f} µs a decision" if current and current["decisions"] else ""
    return Text.assemble(
        "current  ",
        (policies["current"], "bold"),
        f"{took}{previous}; fallback {policies['fallback']}: {fallbacks or 'never needed'}{failed}",
    )


def _shadow(shadow: Mapping[str, Any]) -> Text:
    if shadow["off"]:
        return Text.assemble("shadow   ", (shadow["version"], "bold"), (f" is off: {shadow['off']}", "red"))
    decisions, compared = shadow["decisions"], shadow["compared"]
    return Text.assemble(
        "shadow   ",
        (shadow["version"], "bold"),
        f", {1e6 * shadow['decision_s']['p50_s']:.0f} µs a decision: of {decisions} decisions "
        f"{shadow['disagreements'] / max(1, decisions):.1%} differ, predicted gain "
        f"{shadow['predicted_gain'] / max(1, compared):+.2%} attainment, {sum(shadow['failures'].values())} failures",
    )


def _canary(canary: Mapping[str, Any]) -> Text:
    arm, base = canary["arm"], canary["baseline"]
    return Text.assemble(
        "canary   ",
        (canary["version"], "bold"),
        f", {1e6 * arm['decision_s']['p50_s']:.0f} µs a decision: {canary['share']:.3g} of the requests; attained "
        f"{_attained(arm)}, current {_attained(base)}; {arm['errors']} errors, "
        f"{sum(arm['fallbacks'].values())} fallbacks",
    )


def _attained(arm: Mapping[str, Any]) -> str:
    return f"{arm['attained'] / arm['ended']:.1%} of {arm['ended']}" if arm["ended"] else "none of 0"


def _replicas(replicas: list[Mapping[str, Any]]) -> Table:
    table = _table("replica", "status", "in flight", "running", "waiting", "KV", "metrics' age")
    for replica in replicas:
        age_s = replica["metrics_age_s"]
        table.add_row(
            Text(replica["name"]),
            _status(replica["status"]),
            str(replica["inflight"]),
            *("–" if replica[key] is None else str(replica[key]) for key in ("running", "waiting")),
            "–" if replica["kv_use"] is None else f"{replica['kv_use']:.0%}",
            "–" if age_s is None else f"{age_s:.1f} s",
        )
    return table


def _status(status: str) -> Text:
    return Text(status, style={"up": "green", "down": "red"}.get(status, "yellow"))


def _tenants(state: State, before: State | None, elapsed_s: float) -> Table:
    table = _table("tenant", "SLO", "in flight", "arrived/s", "ended/s", "attainment")
    for index, tenant in enumerate(state["tenants"]):

        def rate(key: str, index: int = index) -> str:
            return f"{_rate(state, before, elapsed_s, lambda s: float(s['tenants'][index][key])):.1f}"

        attainment = tenant["attainment"]
        table.add_row(
            Text(tenant["name"]),
            f"{tenant['ttft_slo_s']:g} s, {1e3 * tenant['tpot_slo_s']:g} ms",
            str(tenant["inflight"]),
            rate("arrived"),
            rate("ended"),
            Text(f"{attainment:.1%}", style="" if attainment >= 0.95 else "yellow" if attainment >= 0.9 else "red"),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    return table


def _event(at_unix_s: float, sentence: str) -> Text:
    clock = time.strftime("%H:%M:%S ", time.localtime(at_unix_s))
    return Text.assemble((clock, "dim"), sentence, no_wrap=True, overflow="ellipsis")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
