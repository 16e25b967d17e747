"""The policy bundle: `policy.onnx` and `policy.json` in a folder or a zip. See docs/bundle.md.

No pickle is ever read. Loading verifies the files, the observation schema and the hashes, then lets the graph
and the compiled form score the same probes: they must agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import steersman
from steersman.runtime import archive, manifest
from steersman.runtime.errors import UserError
from steersman.runtime.manifest import Graph, Manifest
from steersman.runtime.network import SCALE, Architecture, compiled_policy, parameters
from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, HIGH, LOW, WIDTH
from steersman.runtime.policy import CompiledPolicy, Policy
from steersman.runtime.serving import OnnxPolicy, refuse_other_formats

PROBES = (2, 3, 18)  # candidates of the self-test's observations, hold and shed included
TOLERANCE = 1e-4  # of the largest score: both are float32, and add in different orders


class Bundle(NamedTuple):
    """A verified bundle, in both forms of its policy."""

    manifest: Manifest
    compiled: CompiledPolicy
    serving: OnnxPolicy

    def fastest(self) -> Policy:
        """The form that decides fastest, the graph where there is an MLP; both were found to score alike."""
        return self.serving if self.manifest.architecture.hidden else self.compiled.bind()


def write_bundle(
    path: str | Path,
    *,
    graph: bytes,
    architecture: Architecture,
    weights: np.ndarray,
    name: str,
    fleet: Mapping[str, Any],
    workload: Mapping[str, Any],
    command: str,
    seeds: Mapping[str, int],
    scorecard: Mapping[str, Any],
    summary: str = "The learned scorer.",
) -> None:
    """Write a bundle, whole or not at all, after the checks that loading makes.

    path: a folder, or a file ending in `.zip`; an older bundle there is replaced. graph: from
    `training.export.onnx_graph`. fleet, workload: contents of the files that it was trained on. scorecard:
    held-out figures, baselines included; numbers that are not finite become null.

    Raises:
        UserError: the weights do not fit or are not finite, the graph disagrees with them, or `path` cannot
            be written.
    """
    path = Path(path)
    made = Manifest(
        format=manifest.FORMAT,
        steersman=steersman.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        name=name,
        summary=summary,
        observation=manifest.current_schema(),
        graph=Graph(sha256=hashlib.sha256(graph).hexdigest(), bytes=len(graph)),
        architecture=architecture,
        fleet=manifest.finite(dict(fleet)),
        workload=manifest.finite(dict(workload)),
        command=command,
        seeds=dict(seeds),
        scorecard=manifest.finite(dict(scorecard)),
        weights=manifest.checked_weights(architecture, weights),
    )
    files = {archive.MANIFEST: manifest.to_bytes(made), archive.GRAPH: graph}
    _verified(files, path)
    archive.write(path, files)


def open_bundle(path: str | Path) -> Bundle:
    """The bundle at `path`: its folder, its zip, or the folder of the training run that exported it.

    Raises:
        UserError: there is none, or it is damaged, altered, or of another version; one sentence says which.
    """
    found = archive.locate(Path(path))
    return _verified(archive.read(found), found)


def load_bundle(path: str | Path) -> CompiledPolicy:
    """The policy of a bundle, compiled, for the simulator. Same paths and errors as `open_bundle`."""
    return open_bundle(path).compiled


def load_serving(path: str | Path) -> Policy:
    """The policy of a bundle in the form that decides fastest, for the gateway.

    Same paths and errors as `open_bundle`.
    """
    return open_bundle(path).fastest()


def open_zip(data: bytes, where: str) -> Bundle:
    """The bundle in the bytes of a zip. `where` names it in errors, which are those of `open_bundle`."""
    return _verified(archive.unpack(data, where), where)


def _verified(files: Mapping[str, bytes], path: Path | str) -> Bundle:
    graph, where = files[archive.GRAPH], f"{path}/{archive.GRAPH}"
    refuse_other_formats(graph, where)
    described = manifest.parse(files[archive.MANIFEST], f"{path}/{archive.MANIFEST}")
    if hashlib.sha256(graph).hexdigest() != described.graph.sha256:
        size = described.graph.bytes
        difference = f"{len(graph)} bytes instead of {size}" if len(graph) != size else "its sha256 differs"
        raise UserError(f"{where}: not the file that {archive.MANIFEST} describes ({difference}); {manifest.REMEDY}")
    expected = parameters(described.architecture)
    if len(described.weights) != expected:
        raise UserError(
            f"{path}/{archive.MANIFEST}: {len(described.weights)} weights, but its architecture has "
            f"{expected}; {manifest.REMEDY}"
        )
    compiled = compiled_policy(described.architecture, described.vector, described.name, described.summary)
    serving = OnnxPolicy(described.name, graph, where)
    _self_test(compiled, serving, where)
    return Bundle(described, compiled, serving)


def probes() -> list[np.ndarray]:
    """Observations for the self-test, float32 (C, WIDTH) each: typical values, and both limits."""
    rng = np.random.default_rng(0)
    made = []
    for candidates in PROBES:
        for extreme in (None, LOW, HIGH):
            # From far below the scale to far above.
            rows = SCALE * np.sinh(rng.normal(0.0, 3.0, (candidates, WIDTH)))
            rows = np.clip(rows, LOW, HIGH) if extreme is None else np.tile(extreme, (candidates, 1))
            rows[:, COLUMN["is_replica"]] = 1.0
            rows[:, CANDIDATE_FEATURES:] = rows[-1, CANDIDATE_FEATURES:]
            rows[-1, :CANDIDATE_FEATURES] = 0.0
            made.append(np.ascontiguousarray(rows, np.float32))
    return made


def _self_test(compiled: CompiledPolicy, serving: OnnxPolicy, where: str) -> None:
    bound = compiled.bind()
    pairs = []
    for rows in probes():
        mask = np.ones(len(rows), np.bool_)
        try:
            scores = serving.score(rows, mask)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            message = " ".join(str(error).split())
            raise UserError(
                f"{where}: fails its self-test with {len(rows)} candidates ({message}); {manifest.REMEDY}"
            ) from None
        if not np.isfinite(scores).all():
            raise UserError(
                f"{where}: fails its self-test: a score of {len(rows)} candidates is not finite; train again"
            )
        pairs.append((scores, bound.score(rows, mask)))
    largest = max(float(np.abs(expected).max()) for _, expected in pairs)
    off = max(float(np.abs(scores - expected).max()) for scores, expected in pairs)
    if off > TOLERANCE * largest:
        raise UserError(
            f"{where}: fails its self-test: its scores are up to {off:.3g} off those of the weights in "
            f"{archive.MANIFEST}; {manifest.REMEDY}"
        )
