"""The walls of the package: imports run one way, and what serves needs no learning library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "steersman"
ORDER = ["runtime", "envs", "agents", "training"]
HEAVY = {"torch", "gymnasium", "stable_baselines3", "sb3_contrib", "ray", "tensorboard", "matplotlib", "onnx", "cmaes"}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("part", ORDER)
def test_imports_run_one_way(part: str) -> None:
    later = ORDER[ORDER.index(part) + 1 :]
    for path in (ROOT / part).rglob("*.py"):
        for name in imports(path):
            assert not any(name.startswith(f"steersman.{other}") for other in [*later, "cli"]), f"{path}: {name}"


def test_the_runtime_names_no_learning_library() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & HEAVY, path


@pytest.mark.parametrize(
    "module",
    [
        "steersman.cli",
        "steersman.agents.policies",
        "steersman.runtime.gateway",
        "steersman.runtime.bundle",
        "steersman.runtime.admin.api",
        "steersman.runtime.deployment.watch",
    ],
)
def test_serving_loads_no_learning_library(module: str) -> None:
    code = f"import {module}, sys; from steersman.agents.policies import heuristics; heuristics(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & HEAVY
