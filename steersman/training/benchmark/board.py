"""The comparison in TensorBoard: curves over load, and what each policy came to as hyper-parameters.

Under tensorboard/<scenario>/<policy>/, one run each; the step is the load in percent of the best heuristic's capacity.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter, summary

from steersman.training.benchmark.figures import Figures, Measured


def write_board(folder: Path, all_found: Sequence[Figures]) -> None:
    """Write all runs under `folder`, in place of older ones."""
    shutil.rmtree(folder, ignore_errors=True)
    for found in all_found:
        for policy in found.policies:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", policy.name)
            writer = SummaryWriter(str(folder / found.scenario.name / name))
            try:
                _curves(writer, found, policy)
                _totals(writer, found, policy)
            finally:
                writer.close()


def _curves(writer: SummaryWriter, found: Figures, policy: Measured) -> None:
    for offered, good, worst in found.curves[policy.name]:
        step = round(100 * offered / found.reference_rps)
        writer.add_scalar("load/goodput_rps", good, step)
        writer.add_scalar("load/attainment_worst", worst, step)


def _totals(writer: SummaryWriter, found: Figures, policy: Measured) -> None:
    """Scalars, and a line of the HParams tab with them."""
    values = {
        "benchmark/capacity_rps": policy.capacity_rps.value,
        "benchmark/attainment": policy.attainment,
        "benchmark/attainment_worst": policy.worst[1],
        "benchmark/ttft_p99_s": policy.latency["ttft_s"].p99,
        "benchmark/tpot_p99_s": policy.latency["tpot_s"].p99,
        "benchmark/e2e_p99_s": policy.latency["e2e_s"].p99,
        "benchmark/fairness": policy.fairness,
        "benchmark/tokens_over_ceiling": policy.of_ceiling,
        **{f"benchmark/goodput_{factor:g}x_rps": value.value for factor, value in policy.goodput_rps.items()},
    }
    if policy.cost_per_1000_good is not None:
        values["benchmark/cost_per_1000_good"] = policy.cost_per_1000_good
    for tenant, share in policy.tenants.items():
        writer.add_scalar(f"benchmark/attainment/{tenant}", share, 0)
    described = {
        "scenario": found.scenario.name,
        "policy": policy.name,
        "kind": policy.kind,
        "form": policy.form,
        "evaluations": policy.evaluations,
    }
    protocol: Any = summary
    files: Any = writer.file_writer
    for message in protocol.hparams(described, values):
        files.add_summary(message)
    for tag, value in values.items():
        writer.add_scalar(tag, value, 0)
