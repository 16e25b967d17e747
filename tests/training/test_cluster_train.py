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

pytest.importorskip("ray")

SEARCH = {"population": 6, "generations": 30, "episodes": 2, "pool": 6}
CHANGES = {"algorithms": ["cma-es"], "search": SEARCH, "tune": [], "compare": ["jsed", "push-shed"]}


def stages(run: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (run / "stages").glob("*.json")}


def test_a_killed_driver_goes_on_to_the_same_policy(ray_cluster: Any, tmp_path: Path) -> None:
    for name, data in (("fleet", FLEET), ("workload", WORKLOAD)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    files = {"workload": str(tmp_path / "workload.yaml"), "fleet": str(tmp_path / "fleet.yaml")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(TRAINING | CHANGES | files))
    arguments = ["train", str(tmp_path / "small.yaml"), "--runs"]

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
