"""The benchmark for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steersman.training.benchmark.budget import Budget
from steersman.training.benchmark.figures import Figures, Measured
from steersman.training.benchmark.text import capacity, change, number, parity, percent, training_seeds, verdict

ALWAYS = 9
MAX_TENANTS = 4
NOTES = (
    "capacity: highest offered req/s with 95 % of all and 90 % of each tenant's requests within the SLOs [95 % "
    "interval]. Good req/s at loads relative to the best heuristic's capacity; the columns after it at the headline "
    "load. Shares in %. TTFT, TPOT, E2E: mean / P50 / P99 of completed requests. Jain: fairness over tokens served of "
    "those asked for. tok: computed tokens over the fleet's ceiling. evals: simulated episodes of the search. Green: "
    "learned or given; bold: strongest tuned heuristic."
)


class Column(NamedTuple):
    """A column; those with the lowest `keep` go first where the terminal is narrow."""

    header: str
    text: Callable[[Measured], str]
    keep: int = ALWAYS


def columns(found: Figures) -> list[Column]:
    """What is shown of a scenario."""
    tenants = list(found.policies[0].tenants)
    factors = list(found.policies[0].goodput_rps)
    return [
        Column("evals", lambda p: f"{p.evaluations:,}" if p.evaluations else "", keep=8),
        Column("capacity\nreq/s", lambda p: capacity(found, p)),
        *(Column(f"good\n{factor:g}x", _goodput(factor), keep=7 if factor == 1.2 else 5) for factor in factors),
        Column("SLO\nmet", lambda p: percent(p.attainment)),
        Column("worst tenant", lambda p: f"{p.worst[0]} {percent(p.worst[1])}"),
        *([Column(name, _tenant(name), keep=3) for name in tenants] if 1 < len(tenants) <= MAX_TENANTS else []),
        Column("shed", lambda p: percent(p.shed), keep=1),
        Column("TTFT s\nmean / P50 / P99", _latency("ttft_s", 1, 2), keep=6),
        Column("TPOT ms\nmean / P50 / P99", _latency("tpot_s", 1000, 0), keep=4),
        Column("E2E s\nmean / P50 / P99", _latency("e2e_s", 1, 1), keep=2),
        Column("Jain", lambda p: f"{p.fairness:.3f}", keep=3),
        Column("tok", lambda p: percent(p.of_ceiling), keep=2),
        Column(
            "$ / 1k\ngood", lambda p: "–" if p.cost_per_1000_good is None else f"{p.cost_per_1000_good:.3f}", keep=6
        ),
    ]


def scenario_table(found: Figures, width: int) -> Table:
    """One scenario, highest capacity first; columns are left out, the least telling first, until it fits `width`."""
    kept = columns(found)
    while True:
        table = _table(found, kept)
        optional = [c.keep for c in kept if c.keep < ALWAYS]
        if not optional or Console(width=10_000).measure(table).maximum <= width:
            table.caption = NOTES
            return table
        kept = [c for c in kept if c.keep > min(optional)]


def pairs_table(found: Figures) -> Table:
    """Paired comparisons of a scenario."""
    factors = list(found.pairs[0].goodput)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title="paired, on the same episodes")
    table.title_justify = "left"
    for header in ("policy", "against"):
        table.add_column(header)
    for header in ("capacity", *(f"good {factor:g}x" for factor in factors if factor >= 1), "worst tenant, points"):
        table.add_column(header, justify="right", no_wrap=True)
    for pair in found.pairs:
        worst = " ".join(
            f"{100 * v:+.1f}" if i == 0 else f"{'[' if i == 1 else ''}{100 * v:+.1f}{',' if i == 1 else ']'}"
            for i, v in enumerate(pair.worst)
        )
        goodput = [change(value) for factor, value in pair.goodput.items() if factor >= 1]
        table.add_row(pair.policy, pair.against, change(pair.capacity), *goodput, worst)
    return table


def overview_table(all_found: Sequence[Figures]) -> Table:
    """All scenarios: what the learned policy carries, beside the strongest heuristics."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title="capacity, req/s, and paired ratios")
    table.title_justify = "left"
    for header in ("scenario", "best as shipped", "strongest tuned", "learned"):
        table.add_column(header)
    for header in ("learned / tuned", "learned / shipped", "worst tenant\nlearned, tuned"):
        table.add_column(header, justify="right", no_wrap=True)
    for found in all_found:
        names = [found.best_default, found.best_tuned, *(p.name for p in found.policies if p.form == "trained")]
        rates = [f"{name.split(',')[0]} {number(found.measured(name).capacity_rps.value)}" for name in names]
        learned = [pair for pair in found.pairs if found.measured(pair.policy).form == "trained"]
        by_rival = {pair.against: change(pair.capacity) for pair in learned}
        worst = ", ".join(percent(found.measured(name).worst[1]) for name in reversed(names[1:]))
        table.add_row(
            found.scenario.name,
            *[*rates, ""][:3],
            by_rival.get(found.best_tuned, ""),
            by_rival.get(found.best_default, ""),
            worst,
        )
    return table


def show(console: Console, all_found: Sequence[Figures], budget: Budget) -> None:
    """All tables on the terminal."""
    for found in all_found:
        console.rule(f"[bold]{found.scenario.name}[/]", align="left")
        console.print(found.scenario.description, highlight=False)
        headline = found.scenario.headline
        console.print(
            f"load 1 is {number(found.reference_rps)} req/s; the headline load is {headline:g}, "
            f"{number(headline * found.reference_rps)} req/s",
            highlight=False,
        )
        console.print(scenario_table(found, console.width), highlight=False)
        if found.pairs:
            console.print(pairs_table(found), highlight=False)
        for pair in found.pairs:
            if found.measured(pair.policy).form != "tuned":
                console.print(verdict(found, pair), highlight=False)
        if seeds := training_seeds(found):
            console.print(seeds, highlight=False)
        if headline < 1:
            console.print(parity(found), highlight=False)
        console.print()
    console.rule("[bold]all scenarios[/]", align="left")
    console.print(overview_table(all_found), highlight=False)
    console.print(
        f"budget: at most {budget.evaluations:,} simulated episodes for each tuned heuristic and each learned policy "
        f"(its teacher's included); a search that converged stopped early. {budget.seeds} held-out episodes a load, "
        f"{budget.training_seeds} training seeds.",
        highlight=False,
    )


def _goodput(factor: float) -> Callable[[Measured], str]:
    return lambda p: number(p.goodput_rps[factor].value)


def _tenant(name: str) -> Callable[[Measured], str]:
    return lambda p: percent(p.tenants[name])


def _latency(metric: str, factor: float, digits: int) -> Callable[[Measured], str]:
    # A P99 of 0 stands for "none completed".
    return lambda p: " / ".join(f"{factor * v:.{digits}f}" if p.latency[metric].p99 else "–" for v in p.latency[metric])


def _table(found: Figures, kept: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    table.add_column("policy", no_wrap=True)
    for column in kept:
        table.add_column(Text(column.header, justify="right"), justify="right", no_wrap=True)
    for policy in found.policies:
        style = "green" if policy.form in ("trained", "given") else "bold" if policy.name == found.best_tuned else ""
        table.add_row(Text(policy.name), *(Text(c.text(policy)) for c in kept), style=style)
    return table
