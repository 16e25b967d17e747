"""Pictures of the benchmark, as SVG text to stand inside a page.

Colour says one thing: learned, strongest tuned heuristic, best as shipped, given, or another.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from steersman.training.benchmark.capacity import Interval
from steersman.training.benchmark.figures import Figures, Measured
from steersman.training.figures import HEURISTIC, LEARNED, OTHER, SLO
from steersman.training.sizing import EACH_TENANT

SHIPPED, GIVEN = "#6d5bd0", "#0369a1"
# From white, all met, over amber, where a tenant no longer counts as served, to red.
MISSED = LinearSegmentedColormap.from_list(
    "missed", [(0, "#b91c1c"), (0.5, "#f59e0b"), (0.9, "#fef3c7"), (1, "#ffffff")]
)


def svg(figure: Figure, salt: str) -> str:
    """The figure as an <svg> element, its text as text; the same figure gives the same bytes. salt: its own name."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def paired_chart(all_found: Sequence[Figures]) -> Figure:
    """The learned policy's capacity against two heuristics, a row a scenario, in percent more."""
    rows = [found for found in all_found if any(found.measured(p.policy).form == "trained" for p in found.pairs)]
    figure = _figure(10.4, 1.4 + 0.42 * max(1, len(rows)))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for place, found in enumerate(rows):
        for rival, colour, shift in ((found.best_tuned, HEURISTIC, -0.14), (found.best_default, SHIPPED, 0.14)):
            pair = next(
                (p for p in found.pairs if found.measured(p.policy).form == "trained" and p.against == rival), None
            )
            if pair is not None and np.isfinite(pair.capacity).all():
                value, low, high = (100 * (v - 1) for v in pair.capacity)
                axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=2.5, solid_capstyle="round")
                axes.plot([value], [place + shift], "o", color=colour, markersize=6)
                axes.annotate(
                    f"{value:+.1f} %",
                    (high, place + shift),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                    color=colour,
                )
    _rows(axes, [found.scenario.name for found in rows], [False] * len(rows))
    axes.margins(x=0.12)
    axes.set_xlabel("capacity of the learned policy, % more (95 % interval)")
    axes.grid(axis="x", alpha=0.25)
    _legend(
        figure,
        [("against the strongest tuned heuristic", HEURISTIC), ("against the best heuristic as shipped", SHIPPED)],
    )
    return figure


def goodput_chart(found: Figures) -> Figure:
    """Goodput over offered load, a line a policy."""
    figure, axes, most = _over_load(found)
    axes.plot(*np.array([(0.0, 0.0), *found.arrivals]).T, color=SLO, linewidth=1, linestyle="--")
    _lines(axes, found, 1)
    axes.set_ylim(0, most)
    axes.set_ylabel("goodput, requests per second")
    _legend(figure, [*_meanings(found), ("arrived", SLO)])
    return figure


def worst_chart(found: Figures) -> Figure:
    """The worst tenant's attainment over offered load, a line a policy."""
    figure, axes, _ = _over_load(found)
    axes.axhline(EACH_TENANT, color=SLO, linewidth=1, linestyle="--")
    _lines(axes, found, 2)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("requests of the worst tenant within SLOs")
    _legend(figure, [*_meanings(found), ("what the capacity demands", SLO)])
    return figure


def _over_load(found: Figures) -> tuple[Figure, Axes, float]:
    """A chart over offered load, with its axes and their end."""
    figure = _figure(5.6, 4.2)
    axes = figure.subplots()
    most = max(point[0] for points in found.curves.values() for point in points)
    axes.axvline(found.reference_rps, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        "best heuristic's\ncapacity", (found.reference_rps, 0), xytext=(4, 4), textcoords="offset points", fontsize=8
    )
    axes.set_xlim(0, most)
    axes.set_xlabel("offered, requests per second")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes, most


def _lines(axes: Axes, found: Figures, column: int) -> None:
    """A line a policy, of a column of its curve."""
    for policy in sorted(found.policies, key=lambda p: _marked(found, p)):
        points = np.array([(0.0, 0.0, 1.0), *found.curves[policy.name]])
        wide = 2.4 if _marked(found, policy) else 0.9
        axes.plot(points[:, 0], points[:, column], color=_colour(found, policy), linewidth=wide)


def capacity_chart(found: Figures) -> Figure:
    """SLO capacity of each policy with its interval, highest on top."""
    figure = _figure(5.6, 1.1 + 0.22 * len(found.policies))
    axes = figure.subplots()
    values = [p.capacity_rps for p in found.policies]
    axes.barh(
        range(len(values)), [v.value for v in values], height=0.7, color=[_colour(found, p) for p in found.policies]
    )
    axes.errorbar(
        [v.value for v in values],
        range(len(values)),
        xerr=_errors(values),
        fmt="none",
        ecolor="black",
        elinewidth=1,
        capsize=2,
    )
    for place, value in enumerate(values):
        axes.annotate(
            f"{value.value:.1f}" if value.value else f"below {found.lowest_rps:.1f}",
            (max(value.high, value.value), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    _rows(axes, [p.name for p in found.policies], [bool(_marked(found, p)) for p in found.policies])
    axes.set_xlim(0, 1.14 * max([*(max(v) for v in values), found.lowest_rps]))
    axes.set_xlabel("SLO capacity, requests per second")
    return figure


def tenants_chart(found: Figures) -> Figure:
    """Attainment of each tenant under each policy at the headline load: a sacrificed tenant is seen at once."""
    tenants = list(found.policies[0].tenants)
    table = np.array([[p.tenants[t] for t in tenants] + [p.attainment] for p in found.policies])
    figure = _figure(5.6, 1.1 + 0.22 * len(found.policies))
    axes = figure.subplots()
    axes.imshow(table, cmap=MISSED, vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(table):
        axes.text(
            column,
            row,
            f"{100 * share:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if share < 0.3 else "black",
            fontweight="bold" if share < 0.9 else "normal",
        )
    axes.axvline(len(tenants) - 0.5, color="black", linewidth=1)
    axes.set_xticks(range(len(tenants) + 1), [*tenants, "all"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    _rows(axes, [p.name for p in found.policies], [bool(_marked(found, p)) for p in found.policies])
    axes.set_ylim(len(found.policies) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    return figure


def colours(found: Figures) -> dict[str, str]:
    """The colour of each policy of a scenario."""
    return {p.name: _colour(found, p) for p in found.policies}


def _colour(found: Figures, policy: Measured) -> str:
    if policy.form == "trained":
        return LEARNED
    if policy.form == "given":
        return GIVEN
    return {found.best_tuned: HEURISTIC, found.best_default: SHIPPED}.get(policy.name, OTHER)


def _marked(found: Figures, policy: Measured) -> int:
    """0 for policies in the background; the higher, the further in front."""
    return [OTHER, SHIPPED, HEURISTIC, GIVEN, LEARNED].index(_colour(found, policy))


def _meanings(found: Figures) -> list[tuple[str, str]]:
    forms = {p.form for p in found.policies}
    made = [("learned", LEARNED)] if "trained" in forms else []
    made += [("given", GIVEN)] if "given" in forms else []
    made += [(found.best_tuned, HEURISTIC)]
    made += [(found.best_default, SHIPPED)] if found.best_default != found.best_tuned else []
    return [*made, ("other heuristics", OTHER)]


def _errors(values: Sequence[Interval]) -> np.ndarray:
    """(2, n): what is below and above each value; none where an interval does not hold its value."""
    return np.maximum(0.0, np.array([[v.value - v.low for v in values], [v.high - v.value for v in values]]))


def _rows(axes: Axes, names: Sequence[str], bold: Sequence[bool]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    for text, heavy in zip(axes.get_yticklabels(), bold, strict=True):
        text.set_fontweight("bold" if heavy else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, meanings: Sequence[tuple[str, str]]) -> None:
    lines = [Line2D([], [], color=c, linewidth=3, label=n, linestyle="--" if c == SLO else "-") for n, c in meanings]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")
