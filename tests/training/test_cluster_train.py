"""`steersman train --ray`: the policy of a run without Ray, also when the driver is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cluster import steersman
from test_train import FLEET, TRAINING, WORKLOAD, only_run

from steersman.training.bench.show import ray_table

pytest.importorskip("ray")

SEARCH = {"population": 6, "generations": 30, "episodes": 2, "pool": 6}
CHANGES = {"algorithms": ["cma-es"], "search": SEARCH, "tune": [], "compare": ["jsed", "push-shed"]}


def stages(run: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (run / "stages").glob("*.json")}


def training_file(folder: Path) -> Path:
    """A small training and its files, in `folder`."""
    for name, data in (("fleet", FLEET), ("workload", WORKLOAD)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    files = {"workload": str(folder / "workload.yaml"), "fleet": str(folder / "fleet.yaml")}
    (folder / "small.yaml").write_text(yaml.safe_dump(TRAINING | CHANGES | files))
    return folder / "small.yaml"


def test_a_killed_driver_goes_on_to_the_same_policy(ray_cluster: Any, tmp_path: Path) -> None:
    arguments = ["train", str(training_file(tmp_path)), "--runs"]

    runs = tmp_path / "killed"
    command = [sys.executable, "-m", "steersman.cli", *arguments, str(runs), "--ray", ray_cluster.address]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(runs.glob("*/checkpoints/cma-es.npy")):
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert "cma-es" not in stages(only_run(runs))
    assert steersman("train", "--resume", only_run(runs), "--ray") == 0

    assert steersman(*arguments, tmp_path / "whole") == 0
    assert stages(only_run(runs)) == stages(only_run(tmp_path / "whole"))
    graphs = [(only_run(path) / "bundle" / "policy.onnx").read_bytes() for path in (runs, tmp_path / "whole")]
    assert graphs[0] == graphs[1]


def test_a_submitted_job_trains_on_its_cluster(ray_cluster: Any, tmp_path: Path) -> None:
    file, runs = training_file(tmp_path), tmp_path / "runs"
    ray = Path(sys.executable).with_name("ray")
    address = f"http://{ray_cluster.head_node.webui_url}"
    train = [sys.executable, "-m", "steersman.cli", "train", file, "--runs", runs, "--set", "search.generations=2"]
    command = [ray, "job", "submit", "--address", address, "--", *train, "--ray"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray: 2 workers on 1 node" in done.stdout
    assert (only_run(runs) / "bundle" / "policy.onnx").is_file()


def test_the_bench_compares_workers_with_the_plain_loop(ray_cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert steersman("bench", "ray", "--workers", "1", "--generations", "1", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    (row,) = figures["workers"]
    assert row["efficiency"] == pytest.approx(row["speed_up"])
    assert figures["overhead"] == pytest.approx(1 / row["speed_up"] - 1)
    assert row["sent_bytes_per_worker"] < 100_000
    assert ray_table(figures).row_count == 1
