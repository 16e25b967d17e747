"""What the benchmarks print and draw."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from rich.table import Table


def tables(figures: dict[str, Any]) -> list[Table]:
    """The figures of `simulator.bench` for a terminal."""
    title = f"{figures['machine']}; one core, after compilation, median of {figures['repeats']}"
    made = []
    if figures["scenarios"]:
        made.append(_table(title, ("trace", "policy", "requests", "requests/s", "best", "peer", "ratio")))
        for s in figures["scenarios"]:
            peer = (f"{s['peer_requests_per_s']:,.0f}", f"{s['ratio']:.0f}x") if "ratio" in s else ("", "")
            rates = (f"{s['requests_per_s']:,.0f}", f"{s['best_requests_per_s']:,.0f}")
            made[-1].add_row(s["name"], s["policy"], f"{s['requests']:,}", *rates, *peer)
    made.append(_table("" if made else title, ("what", "figure")))
    for text, name in (
        ("one step of the environment, 8 replicas (µs)", "env_step_us"),
        ("one decision in a batch of 64 clusters of 8 replicas (µs)", "batched_decision_us"),
        ("a clone, 8 replicas, 500 requests in flight (µs)", "clone_us"),
        ("its restoration (µs)", "restore_us"),
    ):
        made[-1].add_row(text, f"{figures[name]:.2f}")
    stream = f"most memory of a process that streams {figures['stream_requests']:,} requests (MiB)"
    made[-1].add_row(stream, f"{figures['peak_mib']:.0f}; {figures['before_mib']:.0f} before it began")
    made[-1].add_row("streamed requests/s, making them included", f"{figures['stream_requests_per_s']:,.0f}")
    made.append(_table("", ("replicas, equally loaded", "requests/s")))
    for row in figures["scaling"]:
        made[-1].add_row(str(row["replicas"]), f"{row['requests_per_s']:,.0f}")
    return made


def decision_table(figures: dict[str, Any]) -> Table:
    """The figures of `decision.bench` for a terminal."""
    sizes = list(figures["p50_us"])
    columns = [f"{name}, {size} candidates" for size in sizes for name in ("P50 µs", "P99 µs")]
    title = f"{figures['machine']}; {figures['policy']}, {figures['rounds']} decisions"
    table = _table(title, ("what", *columns))
    for text, prefix in (
        ("the policy: scores through ONNX Runtime, and pick", ""),
        ("the same with its compiled form", "compiled_"),
        ("observation and guard", "observe_"),
        ("checks, choice and counts", "beside_"),
        ("all of a decision, by the faster form", "decide_"),
    ):
        cells = [f"{figures[prefix + name][size]:.1f}" for size in sizes for name in ("p50_us", "p99_us")]
        table.add_row(text, *cells)
    return table


def journal_table(figures: dict[str, Any]) -> Table:
    """The figures of `journal.bench` for a terminal."""
    title = f"{figures['machine']}; {figures['replicas']} replicas, {figures['decisions']:,} decisions"
    table = _table(title, ("journal", "P50 µs", "P99 µs"))
    table.min_width = len(title)
    for name, text in (("decided", "a decision, where it is made"), ("over", "the end of a request, there")):
        table.add_row(text, f"{figures[f'{name}_p50_us']:.2f}", f"{figures[f'{name}_p99_us']:.2f}")
    table.add_row("both, mean of a request", f"{figures['per_request_us']:.2f}")
    table.add_row("packing and writing, CPU of a thread, a decision", f"{figures['writing_cpu_us_per_decision']:.2f}")
    table.add_row("bytes on disk, a decision", f"{figures['bytes_per_decision']:.0f}")
    table.add_row("dropped", f"{figures['dropped']}")
    return table


def training_table(figures: dict[str, Any]) -> Table:
    """The figures of `training.bench` for a terminal."""
    title = f"{figures['machine']}; {figures['frames']:,} frames, {figures['episodes_ended']} episodes ended"
    free = figures["free_env_frames_per_cpu_s"]
    return _frames(title, "environment", figures, "one that costs nothing", free)


def _frames(title: str, first: str, figures: dict[str, Any], other: str, frames_per_cpu_s: float) -> Table:
    """The simulator's frames, those of another environment, and their ratio."""
    table = _table(title, (first, "frames per CPU second"))
    table.min_width = len(title)
    table.add_row("the simulator", f"{figures['frames_per_cpu_s']:,.0f}")
    table.add_row(other, f"{frames_per_cpu_s:,.0f}")
    table.add_row("ratio", f"{figures['ratio']:.2f}")
    return table


def canary_table(figures: dict[str, Any]) -> Table:
    """The figures of `canary.bench` for a terminal."""
    title = f"{figures['canaries']} canaries of {figures['requests']:,} requests each"
    table = _table(title, ("attainment, current and canary", "share", "taken back", "after, median"))
    table.min_width = len(title)
    for row in figures["rows"]:
        after = "" if row["after"] is None else f"{row['after']:,.0f}"
        met = f"{row['current']:.0%}, {row['canary']:.0%}"
        table.add_row(met, f"{row['share']:g}", f"{row['taken_back']:.1%}", after)
    return table


def gateway_tables(figures: dict[str, Any]) -> list[Table]:
    """The figures of `gateway.measure.bench` for a terminal."""
    rows = figures["targets"]
    title = f"{rows[0]['machine']}; {rows[0]['rounds']} rounds of {rows[0]['seconds']:g} s"
    columns = ("target", "version", "added P50 ms", "P99 ms", "requests/s", "of direct", "CPU µs/request")
    speed = _table(title, (*columns, "stream added ms", "longest gap ms", "stalled", "CPU µs/stream", "errors"))
    for r in rows:
        speed.add_row(
            r["name"],
            r["version"],
            f"{r['added_p50_ms']:.3f}",
            f"{r['p99_ms']:.2f}",
            f"{r['requests_per_s']:,.0f}",
            f"{r['of_direct']:.2f}",
            f"{r['cpu_us_per_request']:.1f}",
            f"{r['stream_added_ms']:.1f}",
            f"{r['stream_max_gap_ms']:.1f}",
            f"{r['stalled_streams']:.0%}",
            f"{r['cpu_us_per_stream']:.0f}",
            f"{r['errors']:.0f}",
        )
    held = [r for r in rows if "held_streams" in r]
    if not held:
        return [speed]
    title = f"{held[0]['streams']:,} streams at once: resident memory (MiB)"
    memory = _table(title, ("target", "held", "errors", "before", "all open", "at their end", "after"))
    for r in held:
        sizes = [f"{r[f'rss_{when}_mib']:.0f}" for when in ("before", "first", "last", "after")]
        memory.add_row(r["name"], f"{r['held_streams']:,}", f"{r['held_errors']}", *sizes)
    return [speed, memory]


def fault_table(figures: dict[str, Any]) -> Table:
    """The figures of `faults.measure.bench` for a terminal."""
    title = (
        f"{figures['machine']}; {figures['policy']}; {figures['rate']:g} requests/s; faults of {figures['seconds']:g} s"
    )
    columns = (
        "scenario",
        "sent",
        "answered",
        "retried",
        "refused",
        "cut",
        "left",
        "lost",
        "worst s",
        "out s",
        "back s",
    )
    table = _table(title, (*columns, "MiB", "descriptors", ""))
    for r in figures["scenarios"]:
        table.add_row(
            r["name"],
            *(f"{r[key]:,}" for key in ("sent", "answered")),
            _known(r["retried"], ",.0f"),
            *(f"{r[key]:,}" for key in ("refused", "cut", "left", "lost")),
            f"{r['worst_s']:.2f}",
            _known(r["out_s"], ".2f"),
            _known(r["back_s"], ".2f"),
            f"{r['memory_before_mib']:.0f} → {_known(r['memory_after_mib'], '.0f')}",
            f"{r['descriptors_before']} → {_known(r['descriptors_after'], '.0f')}",
            "WRONG" if r["wrong"] else "",
        )
    return table


def soak_table(figures: dict[str, Any]) -> Table:
    """The figures of a soak for a terminal."""
    table = _table(f"{figures['machine']}; {figures['policy']}", ("what", "figure"))
    for r in figures["soak"]:
        table.add_row("requests", f"{r['sent']:,} in {r['seconds']:g} s, {r['sent'] / r['seconds']:.0f} a second")
        for key in ("answered", "retried", "refused", "cut", "lost"):
            table.add_row(key, f"{r[key]:,.0f}")
        table.add_row("longest answer (s)", f"{r['worst_s']:.2f}")
        table.add_row(
            "least memory of any 10 s, second half (MiB)", f"{r['memory_first_mib']:.1f} → {r['memory_last_mib']:.1f}"
        )
        table.add_row("its slope (MiB an hour)", f"{r['memory_slope_mib_per_hour']:+.1f}")
        table.add_row(
            "least descriptors of any 10 s, second half", f"{r['descriptors_first']:.0f} → {r['descriptors_last']:.0f}"
        )
        table.add_row("their slope (an hour)", f"{r['descriptors_slope_per_hour']:+.1f}")
        table.add_row("descriptors before it and after", f"{r['descriptors_before']} → {r['descriptors_after']}")
        table.add_row("requests counted as in flight at the end", f"{r['inflight_after']:.0f}")
    return table


def fault_notes(figures: dict[str, Any]) -> list[str]:
    """What else was seen, what was not as it should be, and what was not played, a sentence each."""
    rows = [*figures["scenarios"], *figures["soak"]]
    notes = [f"{r['name']}: {note}" for r in figures["scenarios"] for note in r["notes"]]
    wrong = [f"WRONG in {r['name']}: {what}" for r in rows for what in r["wrong"]]
    skipped = [f"{name} was not played: the package openai is not installed" for name in figures["skipped"]]
    return [*notes, *wrong, *skipped]


def _known(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def rllib_table(figures: dict[str, Any]) -> Table:
    """The figures of `rllib.bench` for a terminal."""
    title = f"{figures['machine']}; {figures['frames']:,} frames in {figures['envs']} environments"
    return _frames(title, "environment, under RLlib's PPO", figures, "CartPole", figures["cartpole_frames_per_cpu_s"])


def ray_table(figures: dict[str, Any]) -> Table:
    """The figures of `ray.bench` for a terminal."""
    played = f"{figures['generations']} generations of {figures['episodes_per_generation']} episodes"
    title = f"{figures['machine']}; {played}"
    columns = ("workers", "ms a generation", "plain loop", "as many threads", "speed-up", "efficiency", "worker CPU ms")
    table = _table(title, (*columns, "parts", "KB sent to each", "ms an empty part", "empty parts/s", "MiB a worker"))
    for row in figures["workers"]:
        table.add_row(
            str(row["workers"]),
            f"{row['generation_s'] * 1000:.0f}",
            f"{row['plain_s'] * 1000:.0f}",
            f"{row['threads_s'] * 1000:.0f}",
            f"{row['speed_up']:.2f}",
            f"{row['efficiency']:.0%}",
            f"{row['worker_cpu_s'] * 1000:.0f}",
            f"{row['parts']:.0f}",
            f"{row['sent_bytes_per_worker'] / 1000:.1f}",
            f"{row['part_ms']:.2f}",
            f"{row['parts_per_s']:,.0f}",
            f"{row['worker_mib']:.0f}",
        )
    return table


def plan_table(figures: dict[str, Any]) -> Table:
    """Speed-ups on more cores than there are, for a terminal."""
    found = figures["plan"]
    measured = (
        f"{found['parts_per_s']:,.0f} parts/s, {found['part_ms']:.1f} ms each, {found['episode_ms']:.1f} ms an episode"
    )
    sizes = [f"{g['candidates']} × {g['episodes']}: {g['one_core_s']:.2g} s" for g in found["rows"][0]["generations"]]
    table = _table(f"on paper, by candidates × episodes of a generation; {measured}", ("cores", *sizes))
    for row in found["rows"]:
        table.add_row(f"{row['cores']:,}", *(f"{g['speed_up']:.3g}" for g in row["generations"]))
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column == "policy" else "right")
    return table


def scaling_figure(scaling: list[dict[str, Any]]) -> Figure:
    """Requests per second over the number of replicas."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    sizes, rates = ([row[name] for row in scaling] for name in ("replicas", "requests_per_s"))
    axes.loglog(sizes, rates, marker="o", color="#0f766e")
    for size, rate in zip(sizes, rates, strict=True):
        axes.annotate(f"{rate:,.0f}", (size, rate), textcoords="offset points", xytext=(6, 6), fontsize=9)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(min(sizes) / 1.3, max(sizes) * 2)  # room for the numbers
    axes.set_ylim(min(rates) / 2, max(rates) * 2)
    axes.set_xlabel("replicas, equally loaded")
    axes.set_ylabel("simulated requests/s")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
