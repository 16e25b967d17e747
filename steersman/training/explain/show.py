"""An explanation on the terminal, as a page, and as a picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from steersman.runtime.observation import COLUMN, FEATURES
from steersman.training.explain.difference import Interval
from steersman.training.explain.explain import Example, Explanation
from steersman.training.explain.sentences import PHRASES, value_text
from steersman.training.figures import LEARNED

TITLES = {
    "contested": "The closest decisions",
    "held": "Requests that it held",
    "shed": "Requests that it shed",
}
SAYS = {
    "other replica": "sends to another replica",
    "served": "serves what the other holds or sheds",
    "held": "holds",
    "shed": "sheds",
}


def rendered(found: Explanation) -> Group:
    """For a terminal."""
    parts: list[RenderableType] = [Text(headline(found)), Text(method(found), style="dim")]
    for kind, title in TITLES.items():
        own = [e for e in found.examples if e.kind == kind]
        if own:
            parts += [Text(f"\n{title}", style="bold"), *(part for e in own for part in _example(e))]
    parts += [Text("\nWhat it looks at", style="bold"), _importance(found)]
    parts += [Text(f"\nWhere it differs from {found.against}", style="bold"), Text(differing(found))]
    if found.gains:
        parts.append(_gains(found))
    parts += [Text(""), _attainment(found)]
    return Group(*parts)


def headline(found: Explanation) -> str:
    s = found.shares
    said = f"{_percent(s.sent)} sent to a replica, {_percent(s.shed)} shed"
    if s.held:
        said += f"; before that, {_percent(s.held)} held, for {s.held_s:.2f} s on average"
    return f"{found.policy}: {found.decisions:,} decisions on {s.requests:,} requests: {said}."


def method(found: Explanation) -> str:
    """Where the numbers in brackets come from."""
    if found.exact:
        return "In brackets: terms of its score, which is a sum; + speaks for what it did."
    return "In brackets: by how much its lead shrinks without that difference; + speaks for what it did."


def differing(found: Explanation) -> str:
    total = sum(found.differing.values())
    if not total:
        return f"It decides as {found.against} does."
    kinds = ", ".join(f"{SAYS[kind]} {_percent(share)}" for kind, share in found.differing.items())
    return f"On {_percent(total)} of the requests it decides otherwise: {kinds}."


def _example(e: Example) -> Iterator[RenderableType]:
    yield Text(f"t = {e.time_s:.1f} s, {e.tenant}, {e.prompt_tokens:,} prompt tokens: {e.sentence}")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left", style="dim")
    for c in e.candidates:
        mark = "→ " if c.chosen else "  "
        table.add_row(mark + c.name, score_text(c.score), c.behind, style="green" if c.chosen else "")
    yield Padding(table, (0, 0, 0, 4))


def score_text(score: float) -> str:
    text = f"{score:.3g}" if abs(score) >= 1e4 else f"{round(score, 4) + 0.0:.4f}"
    return text.replace("-", "−")


def _importance(found: Explanation) -> RenderableType:
    if not any(found.importance.values()):
        return Text("At no feature: no decision changes when any one of them is hidden.")
    table = _table("feature", "decides otherwise without it", "its effect on the lead of the chosen replica")
    curves = {d.feature: d for d in found.dependence}
    for feature, share in list(found.importance.items())[: max(len(curves), 6)]:
        if share:
            said = ""
            if feature in curves:
                d = curves[feature]
                ends = (value_text(feature, float(v)) for v in (d.values[0], d.values[-1]))
                leads = (score_text(float(v)) for v in (d.median[0], d.median[-1]))
                kept = (_percent(float(v)) for v in (d.kept[0], d.kept[-1]))
                said = "{} → {}: lead {} → {}, still chosen {} → {}".format(*ends, *leads, *kept)
            table.add_row(PHRASES[feature].noun, _percent(share), said)
    return table


def _gains(found: Explanation) -> Table:
    table = _table("where it", "played again", "more requests in time, a decision", "of these, the request itself")
    for kind, gain in found.gains.items():
        own = f"{gain.own + 0.0:+.2f}".replace("-", "−")
        table.add_row(SAYS[kind], f"{gain.rolled}", _interval(gain.attained, 1, "+.2f"), own)
    return table


def _attainment(found: Explanation) -> Table:
    table = _table(f"SLO met, {found.episodes} episodes", found.policy, found.against, "difference, points")
    for tenant, a in found.attainment.items():
        table.add_row(tenant, _percent(a.policy), _percent(a.against), _interval(a.difference, 100, "+.1f"))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column.startswith("its effect") else "right")
    return table


def _interval(interval: Interval, factor: float, form: str) -> str:
    # Plus zero, so that what rounds to nothing has no sign.
    mean, low, high = (format(round(factor * value, 2) + 0.0, form).replace("-", "−") for value in interval)
    return f"{mean} [{low}, {high}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def dependence_figure(found: Explanation) -> Figure:
    """The lead over each of the most important features: median and quartiles over situations."""
    columns = min(3, max(1, len(found.dependence)))
    rows = max(1, -(-len(found.dependence) // columns))
    figure = Figure(figsize=(4.0 * columns, 0.7 + 3.0 * rows), dpi=150, layout="constrained")
    figure.suptitle(f"{found.policy}: lead of the chosen replica", x=0.01, ha="left", fontweight="bold", fontsize=12)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, d in zip(panels, found.dependence, strict=False):
        axes.axhline(0, color="#b6bcc6", linewidth=1)
        axes.fill_between(d.values, d.low, d.high, color=LEARNED, alpha=0.15, linewidth=0)
        axes.plot(d.values, d.median, color=LEARNED, linewidth=2)
        if max(np.abs(d.median).max(), np.abs(d.low).max()) > 1e3:
            axes.set_yscale("symlog")
        unit = FEATURES[COLUMN[d.feature]].unit
        axes.set_xlabel(f"{d.feature}, {unit}")
        axes.set_title(f"{PHRASES[d.feature].noun}:\nchosen {_percent(d.kept[0])} → {_percent(d.kept[-1])}", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(found.dependence) :]:
        axes.set_axis_off()
    return figure


def page(found: Explanation) -> str:
    """A self-contained HTML page."""
    console = Console(record=True, width=130, file=io.StringIO())
    console.print(rendered(found), highlight=False)
    text = console.export_html(inline_styles=True, code_format="{code}")
    picture = io.BytesIO()
    dependence_figure(found).savefig(picture, format="png")
    source = base64.b64encode(picture.getvalue()).decode()
    title = html.escape(f"{found.policy}, explained")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font-family:system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "pre{font-family:ui-monospace,monospace;font-size:.85rem;overflow-x:auto;white-space:pre-wrap}"
        f"img{{max-width:100%}}</style><h1>{title}</h1><pre>{text}</pre>"
        f'<img alt="partial dependence" src="data:image/png;base64,{source}"></html>\n'
    )


def write_page(found: Explanation, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found), encoding="utf-8")


def write_figure(found: Explanation, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dependence_figure(found).savefig(path)
