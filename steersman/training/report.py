"""The comparison of policies: a table for the terminal, the same in markdown, and plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from steersman.runtime.outcomes import Latency, Summary
from steersman.training.paired import Paired, paired

__all__ = ["Paired", "comparison_json", "comparison_markdown", "comparison_table", "paired", "ranked"]

MAX_TENANT_COLUMNS = 4
ALWAYS = 9
MISSING = "–"
NOTES = (
    "Shares in %. SLO met: share of arrived requests within both SLOs. TTFT, TPOT: P50 / P99 of completed "
    "requests. busy: time with an iteration running. occ: running sequences over max_num_seqs. held: at the gateway. "
    "Bold: best of its column."
)


def comparison_json(summaries: Sequence[Summary], pairs: Sequence[Paired] = ()) -> dict[str, Any]:
    """The comparison as plain data.

    {"policies": [the fields of `Summary`, in the given order], "paired": [the fields of `Paired`]};
    numbers that JSON does not know (an infinite ratio) are null.
    """
    return {
        "policies": [summary.model_dump(mode="json") for summary in summaries],
        "paired": [
            {
                key: value if isinstance(value, str) or math.isfinite(value) else None
                for key, value in pair._asdict().items()
            }
            for pair in pairs
        ],
    }


class Part(NamedTuple):
    """A number of a cell: its value (None: there is none), its text, and which way is better."""

    value: Callable[[Summary], float | None]
    text: Callable[[float], str]
    better: int  # 1: higher, -1: lower, 0: neither


class Column(NamedTuple):
    """A column of the comparison; `keep`: those with the lowest go first where the terminal is narrow."""

    header: str
    parts: tuple[Part, ...]
    keep: int = ALWAYS


def comparison_table(summaries: Sequence[Summary], best: str | None, width: int = 120) -> Table:
    """The comparison for a terminal of `width` columns, best goodput first; the row of `best` is marked.

    Columns are left out, the least telling first, until the table fits; the policy, goodput, attainment and
    latencies always stay.
    """
    kept = columns(summaries)
    table = _table(summaries, kept, best, gap=1)
    while _width(table) > width:
        table = _table(summaries, kept, best, gap=0)
        optional = [c.keep for c in kept if c.keep < ALWAYS]
        if not optional:
            break
        kept = [c for c in kept if c.keep > min(optional)]
    return table


def comparison_markdown(summaries: Sequence[Summary], best: str | None) -> str:
    """The same table, with every column, in markdown."""
    kept = columns(summaries)
    rows = [["policy", *(c.header.replace("\n", " ") for c in kept)], ["---", *("---:" for _ in kept)]]
    for summary in ranked(summaries):
        name = f"**{summary.policy}**" if summary.policy == best else summary.policy
        cells = (_cell(summary, summaries, c) for c in kept)
        rows.append([name, *(" / ".join(f"**{t}**" if bold else t for t, bold in cell) for cell in cells)])
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join(lines) + f"\n\n{NOTES}\n"


def ranked(summaries: Sequence[Summary]) -> list[Summary]:
    """Best goodput first."""
    return sorted(summaries, key=lambda s: -s.goodput_rps)


def columns(summaries: Sequence[Summary]) -> list[Column]:
    """What the comparison shows of these summaries."""
    tenants = list(dict.fromkeys(name for summary in summaries for name in summary.tenants))
    shown = tenants if 1 < len(tenants) <= MAX_TENANT_COLUMNS else []
    return [
        Column("good\nreq/s", (Part(lambda s: s.goodput_rps, lambda v: f"{v:.{_digits(v)}f}", 1),)),
        Column("SLO\nmet", (Part(lambda s: s.attainment, _percent, 1),)),
        *(Column(name, (Part(_attainment(name), _percent, 1),)) for name in shown),
        *(
            [Column("worst\ntenant", (Part(lambda s: s.worst_tenant_attainment, _percent, 1),))]
            if len(tenants) > MAX_TENANT_COLUMNS
            else []
        ),
        Column("TTFT s\nP50 / P99", _latencies(lambda s: s.ttft_s, lambda v: f"{v:.{_digits(v)}f}")),
        Column("TPOT ms\nP50 / P99", _latencies(lambda s: s.tpot_s, lambda v: f"{1000 * v:.0f}")),
        Column("busy", (Part(lambda s: s.busy or None, _whole, 0),), keep=2),
        Column("occ", (Part(lambda s: s.occupancy or None, _whole, 0),), keep=3),
        Column("prefix\nhit", (Part(lambda s: s.prefix_hit, _percent, 1),), keep=4),
        Column("shed", (Part(lambda s: s.shed / max(1, s.arrived), _percent, -1),), keep=5),
        *(
            [Column("held", (Part(lambda s: s.held / max(1, s.arrived), _percent, 0),), keep=1)]
            if any(s.held for s in summaries)
            else []
        ),
        Column(
            "$ / 1k\ngood",
            (Part(lambda s: s.cost_per_1000_good or None, lambda v: f"{v:.{_digits(v)}f}", -1),),
            keep=6,
        ),
    ]


def _attainment(tenant: str) -> Callable[[Summary], float | None]:
    return lambda s: s.tenants[tenant].attainment if tenant in s.tenants else None


def _latencies(of: Callable[[Summary], Latency], text: Callable[[float], str]) -> tuple[Part, ...]:
    # A percentile of 0 stands for "none completed": a real TTFT is never 0, TPOT only for single tokens.
    return (Part(lambda s: of(s).p50 or None, text, -1), Part(lambda s: of(s).p99 or None, text, -1))


def _digits(value: float) -> int:
    return 1 if value >= 10 else 2 if value >= 0.1 else 3


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _whole(share: float) -> str:
    return f"{100 * share:.0f}"


def _broken(name: str) -> str:
    """A header over two lines where it is long and has a joint."""
    joints = [i for i, letter in enumerate(name) if letter in "-_ ." and 0 < i < len(name) - 1]
    if len(name) <= 8 or not joints or "\n" in name:
        return name
    middle = min(joints, key=lambda i: abs(i + 1 - len(name) / 2))
    return f"{name[: middle + 1]}\n{name[middle + 1 :]}"


def _cell(summary: Summary, summaries: Sequence[Summary], column: Column) -> list[tuple[str, bool]]:
    """The texts of a cell, each with whether it is its column's best."""
    cell = []
    for part in column.parts:
        value = part.value(summary)
        known = [v for v in map(part.value, summaries) if v is not None]
        text = MISSING if value is None else part.text(value)
        # Numbers that read the same are equally good: bold tells no difference that the table does not show.
        best = part.text(max(known) if part.better > 0 else min(known)) if known and part.better else None
        cell.append((text, text == best and len(summaries) > 1))
    return cell


def _table(summaries: Sequence[Summary], kept: Sequence[Column], best: str | None, gap: int) -> Table:
    title = ", ".join(dict.fromkeys(f"{s.episodes} episodes, {s.offered_rps:.1f} req/s offered" for s in summaries))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap), title=title, caption=NOTES)
    table.title_justify = table.caption_justify = "left"
    table.add_column("policy", no_wrap=True)
    for column in kept:
        table.add_column(Text(_broken(column.header), justify="right"), justify="right", no_wrap=True)
    for summary in ranked(summaries):
        texts = []
        for column in kept:
            cell = _cell(summary, summaries, column)
            # The parts of a cell stand below each other in their column: pad each to its widest.
            widths = [max(len(_cell(s, summaries, column)[i][0]) for s in summaries) for i in range(len(cell))]
            text = Text(justify="right")
            for i, ((value, bold), wide) in enumerate(zip(cell, widths, strict=True)):
                text.append(" / " if i else "").append(" " * (wide - len(value)))
                text.append(value, style="bold" if bold else "")
            texts.append(text)
        table.add_row(summary.policy, *texts, style="green" if summary.policy == best else "")
    return table


def _width(table: Table) -> int:
    """Columns that the table takes without its caption, when nothing is cut."""
    from rich.console import Console

    console = Console(width=10_000)
    bare = Table(box=table.box, show_edge=False, pad_edge=False, padding=table.padding)
    bare.columns = table.columns
    return console.measure(bare).maximum
