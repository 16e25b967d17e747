"""`python -m steersman.runtime.workload`: fit length tables to a trace, show a workload's statistics."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from steersman.runtime.configs import find_config
from steersman.runtime.errors import UserError
from steersman.runtime.requests import Requests
from steersman.runtime.workload._fit import fit_quantiles
from steersman.runtime.workload._source import Split
from steersman.runtime.workload._statistics import Statistics, statistics
from steersman.runtime.workload._workload import load_workload
from steersman.runtime.workload.azure import parse_azure
from steersman.runtime.workload.mooncake import parse_mooncake


def fit(file: Path, min_output: int = 1) -> str:
    """Length tables of a trace's requests with at least `min_output` output tokens, as YAML.

    Raises:
        UserError: the file is no trace, or no request is left.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    trace = (parse_mooncake if file.suffix == ".jsonl" else parse_azure)(data, str(file))
    kept = trace.output_tokens >= min_output
    if not kept.any():
        raise UserError(f"{file}: no request has {min_output} or more output tokens")
    lines = [f"# {file.name}, {kept.sum():,} requests of {min_output} or more output tokens"]
    for name in ("prompt_tokens", "output_tokens"):
        values = getattr(trace, name)[kept]
        table = ", ".join(f"{p:g}: {v}" for p, v in fit_quantiles(values).items())
        lines += [f"{name}:  # mean {values.mean():.0f}", f"  quantiles: {{{table}}}"]
    return "\n".join(lines)


def show(episodes: Sequence[Requests]) -> str:
    """Statistics of `episodes`, at least one, as a Markdown table: a row for each tenant and one for all."""
    lines = [
        "| tenant | requests/s | gap CV | prompt p50 / p90 / p99 | output p50 / p90 / p99 | prefix share |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [_row(name, statistics(episodes, name)) for name in episodes[0].tenants]
    return "\n".join([*lines, _row("all", statistics(episodes))])


def _row(name: str, s: Statistics) -> str:
    prompt, output = (" / ".join(f"{v:,}" for v in values) for values in (s.prompt_tokens, s.output_tokens))
    return f"| {name} | {s.rate_rps:.2f} | {s.gap_cv:.2f} | {prompt} | {output} | {s.prefix_share:.1%} |"


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; a user's mistake is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m steersman.runtime.workload", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fit", help="print the length tables of a trace as YAML")
    command.add_argument("file", type=Path, help="an Azure .csv or a Mooncake .jsonl")
    command.add_argument("--min-output", type=int, default=1, help="only requests of that many output tokens")
    command = commands.add_parser("show", help="print the statistics of a workload's episodes")
    command.add_argument("workload", help="a workload's name or file")
    command.add_argument("--episodes", type=_positive, default=20)
    command.add_argument("--load", type=float, default=1.0)
    command.add_argument("--duration", type=float, default=None, metavar="SECONDS")
    command.add_argument("--split", choices=get_args(Split), default="train")
    command.add_argument("--traces", type=Path, default=None, metavar="DIR")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        if options.command == "fit":
            print(fit(options.file, options.min_output))
        else:
            workload = load_workload(find_config("workloads", options.workload), options.set, options.traces)
            print(
                show(
                    [
                        workload.sample(seed, load=options.load, split=options.split, duration_s=options.duration)
                        for seed in range(options.episodes)
                    ]
                )
            )
    except UserError as error:
        print(f"steersman: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
