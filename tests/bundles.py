"""Small policy bundles for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steersman.runtime.network import Architecture, parameters
from steersman.training.export import export_bundle

ARCHITECTURE = Architecture(hidden=(8,))
WEIGHTS = np.random.default_rng(0).normal(size=parameters(ARCHITECTURE)).astype(np.float32).astype(float)
WEIGHTS[0] = 50.0  # of being a replica: it sheds nothing


def export(path: Path, **changes: Any) -> Path:
    facts: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "weights": WEIGHTS,
        "name": "learned",
        "fleet": {"description": "A fleet."},
        "workload": {"description": "A workload."},
        "command": "steersman train",
        "seeds": {"run": 3},
        "scorecard": {"policies": [{"policy": "jsed", "goodput_rps": 1.5}], "ratio": float("nan")},
    }
    export_bundle(path, **(facts | changes))
    return path
