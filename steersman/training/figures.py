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
    figure = _figure(9, 1.4 + 0.3 * len(rows))
    axes = figure.subplots()
    values = [s.goodput_rps for s in rows]
    bars = axes.barh(
        range(len(rows)), values, height=0.72, color=[_colour(s.policy, learned, heuristic) for s in rows]
    )
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    offered = max((s.offered_rps for s in rows), default=0.0)
    axes.axvline(offered, color=SLO, linewidth=1, linestyle="--")
    axes.text(offered, -0.9, "offered ", color=SLO, fontsize=9, ha="right", va="bottom")
    _policies(axes, [s.policy for s in rows], learned)
    axes.set_xlim(0, max([offered, *values]) * 1.06)
    axes.set_xlabel("requests per second that met both SLOs")
    axes.set_title("Goodput on held-out episodes", loc="left", fontweight="bold")
    return figure


def attainment_bars(summaries: Sequence[Summary], learned: str) -> Figure:
    """Attainment of each policy, a bar a tenant; the black mark is the attainment over all requests."""
    rows = ranked(summaries)
    tenants = list(dict.fromkeys(name for s in rows for name in s.tenants))
    figure = _figure(9, 1.6 + max(0.3, 0.16 * len(tenants)) * len(rows))
    axes = figure.subplots()
    height = 0.8 / max(1, len(tenants))
    for i, tenant in enumerate(tenants):
        values = [100 * s.tenants[tenant].attainment if tenant in s.tenants else 0.0 for s in rows]
        places = np.arange(len(rows)) - 0.4 + height * (i + 0.5)
        axes.barh(places, values, height=height * 0.9, color=TENANTS[i % len(TENANTS)], label=tenant)
    axes.scatter(
        [100 * s.attainment for s in rows], range(len(rows)), marker="|", s=260, color="black",
        linewidths=2, zorder=3, label="all requests",
    )  # fmt: skip
    _policies(axes, [s.policy for s in rows], learned)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of arrived requests that met both SLOs")
    axes.set_title("Attainment on held-out episodes", loc="left", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def latency_cdf(
    episodes: Mapping[str, Sequence[Episode]], column: str, learned: str, heuristic: str
) -> Figure:
    """Share of arrived requests that were served within x seconds, a panel a tenant, a line a policy.

    column: "ttft_s" or "tpot_s". Shed and failed requests never arrive, so such a line ends below 100 %.
    """
    first = next(iter(episodes.values()), [])
    tenants = list(first[0].requests.tenants.items()) if first else []
    figure = _figure(max(5.0, 4.4 * len(tenants)), 4.4)
    name = column.removesuffix("_s").upper()
    panels = figure.subplots(1, max(1, len(tenants)), squeeze=False, sharey=True)[0]
    for index, (axes, (tenant, terms)) in enumerate(zip(panels, tenants, strict=False)):
        for policy in sorted(episodes, key=lambda p: (p == learned, p == heuristic)):
            values, arrived = _values(episodes[policy], column, index)
            if arrived:
                x, y = _curve(values, arrived)
                marked = policy in (learned, heuristic)
                axes.plot(
                    x, 100 * y, color=_colour(policy, learned, heuristic), linewidth=2 if marked else 0.9
                )
        promise = getattr(terms.slo, column)
        axes.axvline(promise, color=SLO, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlim(promise / 30, promise * 30)
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.25)
        axes.set_xlabel(f"{name} (s)")
        axes.set_title(f"{tenant} (SLO {promise:g} s)", fontsize=10)
    panels[0].set_ylabel("% of arrived requests served within")
    figure.suptitle(f"{name} on held-out episodes", x=0.01, ha="left", fontweight="bold", fontsize=12)
    others = any(policy not in (learned, heuristic) for policy in episodes)
    shown = [(learned, LEARNED, 2.0), *([(heuristic, HEURISTIC, 2.0)] if heuristic != learned else [])]
    figure.legend(
        handles=[
            *(Line2D([], [], color=c, linewidth=w, label=p) for p, c, w in shown if p in episodes),
            *([Line2D([], [], color=OTHER, label="other policies")] if others else []),
            Line2D([], [], color=SLO, linestyle="--", linewidth=1, label="SLO"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _colour(policy: str, learned: str, heuristic: str) -> str:
    return LEARNED if policy == learned else HEURISTIC if policy == heuristic else OTHER


def _policies(axes: Axes, names: Sequence[str], learned: str) -> None:
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == learned else "normal")
    axes.invert_yaxis()
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
