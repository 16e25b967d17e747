"""Policies by name, with parameters, or from a path; errors that help."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from steersman.agents.policies import heuristics, resolve, spec_of
from steersman.runtime.errors import UserError


@pytest.mark.parametrize("name", sorted(heuristics()))
def test_every_listed_name_resolves(name: str) -> None:
    assert resolve(name) is heuristics()[name]


def test_parameters_change_only_what_they_name() -> None:
    policy = resolve("sglang-cache-aware?cache_threshold=0.5&abs_threshold=8")
    assert policy.values.tolist() == [8.0, 1.5, 0.5]
    assert resolve("sglang-cache-aware").values.tolist() == [64.0, 1.5, 0.3]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("jsde", "there is no policy 'jsde'; did you mean 'jsed'?"),
        (
            "jsed?decode_wieght=1",
            "policy 'jsed' has no parameter 'decode_wieght'; did you mean 'decode_weight'?",
        ),
        ("jsed?decode_weight=fast", "'decode_weight=fast' must be key=number"),
        ("jsed?decode_weight=nan", "'decode_weight=nan' must be key=number"),
        ("jsed?decode_weight", "'decode_weight' must be key=number"),
        ("jsed?=1", "'=1' must be key=number"),
        ("jsed?", "'' must be key=number"),
        ("numpy:pi", "policy 'numpy:pi' is a float, not a CompiledPolicy"),
        ("numpy:no_such_thing", "policy 'numpy:no_such_thing' cannot be imported"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_to_do(spec: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(spec)
    assert sentence in str(error.value)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths that were given to the bundle's loader, which returns `jsed`."""
    paths: list[Path] = []
    bundle = ModuleType("steersman.runtime.bundle")

    def load_bundle(path: Path) -> object:
        paths.append(path)
        return resolve("jsed")

    bundle.load_bundle = load_bundle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "steersman.runtime.bundle", bundle)
    return paths


def test_a_path_is_loaded_as_a_bundle(tmp_path: Path, loaded: list[Path]) -> None:
    resolve(str(tmp_path))
    resolve("runs/none-yet")
    resolve("policy.zip")
    assert loaded == [tmp_path, Path("runs/none-yet"), Path("policy.zip")]


def test_a_heuristic_wins_over_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Path]
) -> None:
    (tmp_path / "jsed").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("jsed").name == "jsed"
    assert not loaded


def test_a_tuned_heuristic_can_be_written_down_and_resolved_again() -> None:
    tuned = resolve("push-shed").with_values(np.linspace(0.1, 2.0, len(resolve("push-shed").params)), "push-shed-tuned")
    again = resolve(spec_of("push-shed", tuned))
    assert again.name == "push-shed"
    assert again.values == pytest.approx(tuned.values, rel=1e-5)
