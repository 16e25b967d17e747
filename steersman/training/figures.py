"""Pictures of a comparison, as matplotlib figures without pyplot's global state.

Colour says one thing: the learned policy, the best heuristic, or another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steersman.runtime.outcomes import Episode, Summary
from steersman.training import tags
from steersman.training.report import ranked

LEARNED, HEURISTIC, OTHER, SLO = "#0f766e", "#d97706", "#b6bcc6", "#b91c1c"
# Okabe and Ito's colours: told apart with any colour vision.
TENANTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
SPAN = 30  # of the latency axis to both sides of the promise, a factor
POINTS = 500  # of a curve: finer than its pixels


def render(figure: Figure) -> np.ndarray:
    """The picture as uint8 (height, width, 3)."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def figures(
    summaries: Sequence[Summary],
    episodes: Mapping[str, Sequence[Episode]],
    learned: str,
    heuristic: str,
) -> dict[str, Figure]:
    """All pictures by tag. `learned`, `heuristic`: the names of the two policies that are emphasised."""
    return {
        tags.GOODPUT_BARS: goodput_bars(summaries, learned, heuristic),
        tags.ATTAINMENT_BARS: attainment_bars(summaries, learned),
        tags.TTFT_CDF: latency_cdf(episodes, "ttft_s", learned, heuristic),
        tags.TPOT_CDF: latency_cdf(episodes, "tpot_s", learned, heuristic),
    }


def goodput_bars(summaries: Sequence[Summary], learned: str, heuristic: str) -> Figure:
    """Goodput of each policy, requests per second, the best on top."""
    rows = ranked(summaries)
    figure = _figure(1.3 + 0.24 * len(rows), "Goodput on held-out episodes")
    axes = figure.subplots()
    values = [s.goodput_rps for s in rows]
    bars = axes.barh(range(len(rows)), values, height=0.72, color=[_colour(s.policy, learned, heuristic) for s in rows])
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    offered = max((s.offered_rps for s in rows), default=0.0)
    axes.axvline(offered, color=SLO, linewidth=1, linestyle="--")
    _policies(axes, [s.policy for s in rows], learned)
    axes.set_xlim(0, max([offered, *values]) * 1.06)
    axes.set_xlabel("requests per second that met both SLOs")
    _legend(figure, [s.policy for s in rows], learned, heuristic, "offered")
    return figure


def attainment_bars(summaries: Sequence[Summary], learned: str) -> Figure:
    """Attainment of each policy, a bar a tenant; the black mark is the attainment over all requests."""
    rows = ranked(summaries)
    tenants = list(dict.fromkeys(name for s in rows for name in s.tenants))
    figure = _figure(1.3 + max(0.24, 0.13 * len(tenants)) * len(rows), "Attainment on held-out episodes")
    axes = figure.subplots()
    height = 0.8 / max(1, len(tenants))
    for i, tenant in enumerate(tenants):
        values = [100 * s.tenants[tenant].attainment if tenant in s.tenants else 0.0 for s in rows]
        places = np.arange(len(rows)) - 0.4 + height * (i + 0.5)
        axes.barh(places, values, height=height * 0.9, color=TENANTS[i % len(TENANTS)], label=tenant)
    for row, summary in enumerate(rows):
        axes.vlines(100 * summary.attainment, row - 0.42, row + 0.42, color="black", linewidth=2)
    _policies(axes, [s.policy for s in rows], learned)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of arrived requests that met both SLOs")
    handles = [*axes.get_legend_handles_labels()[0], Line2D([], [], color="black", label="all requests")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def latency_cdf(episodes: Mapping[str, Sequence[Episode]], column: str, learned: str, heuristic: str) -> Figure:
    """Share of arrived requests that were served within x seconds, a panel a tenant, a line a policy.

    column: "ttft_s" or "tpot_s". Shed and failed requests never end, so such a line stays below 100 %.
    """
    first = next(iter(episodes.values()), [])
    tenants = list(first[0].requests.tenants.items()) if first else []
    name = column.removesuffix("_s").upper()
    figure = _figure(1.3 + 2.1 * len(tenants), f"{name} on held-out episodes")
    panels = figure.subplots(max(1, len(tenants)), 1, squeeze=False, sharey=True)[:, 0]
    for index, (axes, (tenant, terms)) in enumerate(zip(panels, tenants, strict=False)):
        for policy in sorted(episodes, key=lambda p: (p == learned, p == heuristic)):
            values, arrived = _values(episodes[policy], column, index)
            if arrived:
                x, y = _curve(values, arrived)
                colour, marked = _colour(policy, learned, heuristic), policy in (learned, heuristic)
                axes.plot(x, 100 * y, color=colour, linewidth=2 if marked else 0.9)
        promise = getattr(terms.slo, column)
        axes.axvline(promise, color=SLO, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlim(promise / SPAN, promise * SPAN)
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.25)
        axes.set_title(f"{tenant}: {promise:g} s promised", fontsize=10, loc="left")
        axes.set_ylabel("% served within")
    panels[-1].set_xlabel(f"{name}, seconds")
    _legend(figure, list(episodes), learned, heuristic, "SLO")
    return figure


def _legend(figure: Figure, names: Sequence[str], learned: str, heuristic: str, line: str) -> None:
    """The meaning of the colours, and of the dashed `line`."""
    shown = [(learned, LEARNED), *([(heuristic, HEURISTIC)] if heuristic != learned else [])]
    handles = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in shown]
    if any(name not in (learned, heuristic) for name in names):
        handles.append(Line2D([], [], color=OTHER, linewidth=3, label="other policies"))
    handles.append(Line2D([], [], color=SLO, linestyle="--", linewidth=1, label=line))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _figure(height: float, title: str) -> Figure:
    """Narrow, so that its letters can still be read in TensorBoard's small cards; `height` in inches."""
    figure = Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    return figure


def _colour(policy: str, learned: str, heuristic: str) -> str:
    return LEARNED if policy == learned else HEURISTIC if policy == heuristic else OTHER


def _policies(axes: Axes, names: Sequence[str], learned: str) -> None:
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == learned else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _values(episodes: Sequence[Episode], column: str, tenant: int) -> tuple[np.ndarray, int]:
    """The finite values of one tenant, sorted, and how many of its requests arrived."""
    own = [getattr(e.outcomes, column)[e.requests.table["tenant"] == tenant] for e in episodes]
    joined = np.concatenate(own) if own else np.zeros(0)
    return np.sort(joined[np.isfinite(joined)]), len(joined)


def _curve(values: np.ndarray, arrived: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of the cumulative share of `arrived`, thinned to what can be seen."""
    index = np.unique(np.linspace(0, len(values) - 1, min(len(values), POINTS)).astype(int))
    # A logarithmic axis has no 0, the TPOT of single-token outputs: such a line starts at the left edge.
    x = np.maximum(values[index], 1e-9)
    share = (index + 1) / arrived
    # Once the last one is served nothing comes: the line goes on level.
    return np.append(x, 1e9), np.append(share, len(values) / arrived)
