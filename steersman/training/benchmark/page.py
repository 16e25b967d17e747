"""The report as one HTML page that needs no network: pictures inside, tables below them, and how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import steersman
from steersman.training.benchmark import charts
from steersman.training.benchmark.figures import Figures, Measured
from steersman.training.benchmark.folder import Folder
from steersman.training.benchmark.tables import columns
from steersman.training.benchmark.text import capacity, change, clear, number, parity, percent, training_seeds, verdict

STYLE = """
:root { color-scheme: light; }
body {
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: #1f2937; background: #f8fafc; margin: 0;
}
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 18px 0 2px; }
section { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; padding: 20px 22px; margin: 18px 0; }
p { margin: 4px 0 8px; }
ul { margin: 4px 0; padding-left: 20px; }
.quiet { color: #6b7280; font-size: 13px; }
.charts { display: flex; flex-wrap: wrap; gap: 12px 20px; align-items: flex-start; }
.charts > div { flex: 1 1 480px; min-width: 0; max-width: 640px; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 11px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { text-align: right; vertical-align: bottom; border-bottom: 2px solid #d1d5db; padding: 3px 4px; white-space: pre; }
td { text-align: right; padding: 2px 4px; border-bottom: 1px solid #f1f5f9; }
th:first-child, td:first-child { text-align: left; }
.trained td:first-child, .given td:first-child, .marked td:first-child { font-weight: 700; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 6px; }
.up { color: #0f766e; font-weight: 600; }
.down { color: #b91c1c; font-weight: 600; }
pre {
  background: #0f172a; color: #e2e8f0; border-radius: 8px; padding: 12px 14px; font-size: 13px; white-space: pre-wrap;
}
"""

METHOD = """
<p><b>SLO capacity</b>: the highest offered rate at which 95 % of all requests and 90 % of each tenant's get their
first token and their rate of tokens in time; first crossing on a grid of loads, linear in between. Shed and failed
requests count as missed. Ratios are paired: all policies play the same episodes. Intervals are 95 % bootstrap
intervals over held-out episodes and, for the learned policy, training seeds; its figures are means over them.</p>
<p><b>Tuning</b>: every heuristic with parameters is tuned on training episodes with the budget that a learned policy
has, its teacher's part included. The teacher is push-hold-shed at a third of the budget. The strongest tuned
heuristic and the best as shipped are chosen by the capacities measured here, which favours the heuristics.</p>
<p><b>Columns</b>: goodput at loads relative to the best heuristic's capacity; the rest at the scenario's headline
load. Latencies are of completed requests, mean / P50 / P99. Jain: fairness index of tokens served over tokens asked
for, an output token counting double. tok: tokens computed over what the fleet's cost model allows at most.</p>
"""


def page(folder: Folder, all_found: Sequence[Figures]) -> str:
    """The whole report."""
    budget = folder.plan.budget
    body = [
        "<h1>Steersman benchmark</h1>",
        f"<p class=quiet>steersman {escape(steersman.__version__)} · {budget.seeds} held-out episodes at each load · "
        f"{budget.training_seeds} training seeds · at most {budget.evaluations:,} simulated episodes a search</p>",
        _overview(all_found),
        *(_scenario(found) for found in all_found),
        _section("Budgets", _budgets(all_found)),
        _section("How it is measured", METHOD),
        _section("Commands", _commands(folder)),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html>\n<html lang=en><head>{head}<title>Steersman benchmark</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _overview(all_found: Sequence[Figures]) -> str:
    sentences = []
    for found in all_found:
        for pair in found.pairs:
            form = found.measured(pair.policy).form
            if pair.against == found.best_tuned and form in ("trained", "given"):
                mark = {1: "up", -1: "down", 0: ""}[clear(pair.capacity)]
                text = f"<span class='{mark}'>{escape(verdict(found, pair))}</span>"
                light = f" {parity(found)}" if found.scenario.headline < 1 else ""
                sentences.append(f"<li><b>{escape(found.scenario.name)}</b>: {text}{light}</li>")
    chart = ""
    if any(found.measured(pair.policy).form == "trained" for found in all_found for pair in found.pairs):
        chart = charts.svg(charts.paired_chart(all_found), "paired")
    return _section("In short", f"<ul>{''.join(sentences)}</ul>{chart}{_summary(all_found)}")


def _summary(all_found: Sequence[Figures]) -> str:
    header = ["scenario", "best as shipped", "req/s", "strongest tuned", "req/s", "learned, req/s"]
    header += ["worst tenant,\nlearned", "worst tenant,\ntuned"]
    rows = []
    for found in all_found:
        default, tuned = found.measured(found.best_default), found.measured(found.best_tuned)
        learned = next((p for p in found.policies if p.form == "trained"), None)
        cells = [found.scenario.name, default.name, capacity(found, default), tuned.name, capacity(found, tuned)]
        cells = [escape(cell) for cell in [*cells, capacity(found, learned) if learned else "–"]]
        rows.append(("", [*cells, _worst(learned) if learned else "–", _worst(tuned)]))
    return "<h3>Capacity, and the worst tenant's attainment (%) at the headline load</h3>" + _table(header, rows)


def _scenario(found: Figures) -> str:
    scenario, headline = found.scenario, found.scenario.headline
    drawn = {
        "Goodput over load": charts.goodput_chart(found),
        "The worst tenant over load": charts.worst_chart(found),
        "SLO capacity, with 95 % intervals": charts.capacity_chart(found),
        "SLOs met by tenant at the headline load, %": charts.tenants_chart(found),
    }
    pictures = "".join(
        f"<div><h3>{title}</h3>{charts.svg(figure, scenario.name + title)}</div>" for title, figure in drawn.items()
    )
    body = (
        f"<p>{escape(scenario.description)}{' ' + parity(found) if headline < 1 else ''}</p>"
        f"<p class=quiet>Load 1 is {number(found.reference_rps)} req/s, the best heuristic's capacity. "
        f"Headline load: {headline:g}, {number(headline * found.reference_rps)} req/s.</p>"
        f"<div class=charts>{pictures}</div>"
        f"<h3>Paired, on the same episodes</h3>{_pairs(found)}<p class=quiet>{training_seeds(found)}</p>"
        "<h3>All figures</h3>" + _table(["policy", *(c.header for c in columns(found))], _policies(found))
    )
    return _section(f"Scenario {escape(scenario.name)}", body)


def _pairs(found: Figures) -> str:
    factors = [factor for factor in found.policies[0].goodput_rps if factor >= 1]
    rows = []
    for pair in found.pairs:
        worst = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in pair.worst))
        changes = [change(pair.capacity), *(change(pair.goodput[factor]) for factor in factors), worst]
        rows.append(("", [escape(pair.policy), escape(pair.against), *changes]))
    goodput = [f"goodput at {factor:g}x" for factor in factors]
    return _table(["policy", "against", "capacity", *goodput, "worst tenant, points"], rows)


def _policies(found: Figures) -> Iterable[tuple[str, list[str]]]:
    colours = charts.colours(found)
    for policy in found.policies:
        marked = policy.name in (found.best_tuned, found.best_default)
        dot = f"<span class=dot style='background:{colours[policy.name]}'></span>"
        cells = [escape(c.text(policy)) for c in columns(found)]
        yield f"{policy.form} {'marked' if marked else ''}", [dot + escape(policy.name), *cells]


def _budgets(all_found: Sequence[Figures]) -> str:
    """Simulated episodes that each search took, a column a scenario that searched."""
    searched = [found for found in all_found if found.scenario.trained_on is None] or list(all_found)[:1]
    names = dict.fromkeys(p.name for found in searched for p in found.policies if p.form in ("tuned", "trained"))
    spent = [{p.name: p.evaluations for p in found.policies} for found in searched]
    rows = [("", [escape(name), *(f"{by_name.get(name, 0):,}" for by_name in spent)]) for name in sorted(names)]
    text = (
        "<p>Simulated episodes that a policy's numbers cost, a learned one's teacher included. A search that found "
        "nothing better for three generations stopped early.</p>"
    )
    return text + _table(["policy", *(f.scenario.trained_on or f.scenario.name for f in searched)], rows)


def _commands(folder: Folder) -> str:
    lines = [
        folder.plan.command,
        f"steersman benchmark --resume {folder.path}   # goes on, or writes this report again",
        f"tensorboard --logdir {folder.path}",
    ]
    notes = "".join(f"<p>{escape(sentence)}</p>" for sentence in folder.plan.skipped)
    return f"<pre>{escape(chr(10).join(lines))}</pre>{notes}"


def _worst(policy: Measured) -> str:
    name, share = policy.worst
    return f"<span class='{'down' if share < 0.9 else ''}'>{escape(name)} {percent(share)}</span>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """rows: (class, cells); cells are HTML."""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    lines = [f"<tr class='{kind}'>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for kind, cells in rows]
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
