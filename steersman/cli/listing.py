"""What there is."""

from __future__ import annotations

from steersman.cli.common import (
    app,
    show_list,
)


@app.command()
def policies() -> None:
    """List the heuristics and their parameters."""
    from steersman.agents.policies import heuristics

    show_list(
        ("policy", "what it does", "parameters"),
        [
            (name, p.summary, ", ".join(f"{k}={v.default:g}" for k, v in p.params.items()))
            for name, p in heuristics().items()
        ],
    )


@app.command()
def workloads() -> None:
    """List the shipped workloads."""
    _list_configs("workloads")


@app.command()
def fleets() -> None:
    """List the shipped fleets."""
    _list_configs("fleets")


def _list_configs(folder: str) -> None:
    from steersman.runtime.configs import config_files, describe

    show_list(
        (folder.removesuffix("s"), "what it is"),
        [(path.stem, describe(path)) for path in config_files(folder)],
    )
