"""The fidelity of the simulator as tables for the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from steersman.training.fidelity import Played

REAL, SIMULATED = "#0072b2", "#d55e00"
UNITS = {
    "ttft": (1.0, "s"),
    "e2e": (1.0, "s"),
    "tpot": (1e3, "ms"),
    "throughput": (1.0, "tok/s"),
    "occupancy": (100.0, "%"),
    "prefix": (100.0, "%"),
}


def metrics_table(report: dict[str, Any]) -> Table:
    """A row a figure, three columns a load: real, simulated, error with its interval."""
    table = Table(box=None, pad_edge=False)
    table.add_column("figure")
    for one in report["loads"]:
        for header in (f"load {one['load']:g}: real", "simulated", "error %"):
            table.add_column(header, justify="right")
    names = list(dict.fromkeys(name for one in report["loads"] for name in one["metrics"]))
    for name in names:
        scale, unit = UNITS[name.partition("_")[0]]
        cells = []
        for one in report["loads"]:
            m = one["metrics"].get(name)
            if m is None:
                cells += ["–", "–", "–"]
            else:
                cells += [f"{scale * m[side]:.3g}" for side in ("real", "simulated")]
                cells.append(f"{100 * m['error']:+.1f} [{100 * m['low']:+.0f}, {100 * m['high']:+.0f}]")
        table.add_row(f"{name.replace('_', ' ')}, {unit}", *cells)
    return table


def ranks_table(report: dict[str, Any]) -> Table:
    """A row a load and figure: the policies from best to worst, real and simulated, and the pairs that disagree."""
    table = Table(box=None, pad_edge=False)
    for header in ("load", "by", "tau", "real, best first", "simulated, best first", "disagree"):
        table.add_column(header, justify="right" if header == "tau" else "left")
    for rank in report["ranks"]:
        orders = (_order(rank[side], rank["by"] == "goodput") for side in ("real", "simulated"))
        tau = "–" if rank["tau"] is None else f"{rank['tau']:.2f}"
        pairs = "; ".join(f"{a} / {b}" for a, b in rank["disagree"]) or "none"
        table.add_row(f"{rank['load']:g}", rank["by"].replace("_", " "), tau, *orders, pairs)
    return table


def _order(values: dict[str, float | None], higher_is_better: bool) -> str:
    known = {policy: value for policy, value in values.items() if value is not None}
    best_first = sorted(known, key=lambda policy: known[policy], reverse=higher_is_better)
    return ", ".join([*(f"{p} {known[p]:.3g}" for p in best_first), *(f"{p} –" for p in values if p not in known)])


def cdf_figure(played: Sequence[Played]) -> Any:
    """The CDFs of TTFT, TPOT and E2E, real and simulated, a row of panels a load, as a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    loads = list(dict.fromkeys(p.load for p in played))
    figure = Figure(figsize=(9.6, 0.7 + 2.2 * len(loads)), dpi=130, layout="constrained")
    panels = figure.subplots(len(loads), 3, squeeze=False, sharey=True)
    for row, load in zip(panels, loads, strict=True):
        for axes, name in zip(row, ("ttft", "tpot", "e2e"), strict=True):
            for side, colour, label in (("real", REAL, "real engines"), ("replayed", SIMULATED, "simulated")):
                parts = [getattr(getattr(p, side).outcomes, f"{name}_s") for p in played if p.load == load]
                values = np.concatenate(parts)
                values = np.sort(values[np.isfinite(values) & (values > 0)])
                style = "--" if side == "replayed" else "-"
                share = 100 * (np.arange(len(values)) + 1) / max(1, len(values))
                axes.plot(values, share, color=colour, linestyle=style, linewidth=1.6, label=label)
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.25)
            axes.set_title(f"{name.upper()} at load {load:g}", fontsize=10, loc="left")
            axes.set_xlabel("seconds", fontsize=8)
        row[0].set_ylabel("% of requests within")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
