"""`steersman tune`: heuristics, searches and learners, resumption, bad input."""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cluster import steersman
from test_cluster_train import stages, training_file

from steersman.agents.policies import resolve
from steersman.runtime.configs import config_files
from steersman.training.objective import Arena
from steersman.training.tuning.space import load_tuning

pytest.importorskip("ray")

from steersman.training.tuning.state import keep, recover

SMALL = {"trials": 2, "rounds": 2, "episodes": 2, "seed": 1}
HEURISTIC = {"description": "A heuristic.", "policy": "push-shed", "set": ["search.generations=3"]}
PPO = SMALL | {
    "rounds": 1,
    "description": "A learner.",
    "set": ["algorithms=[maskable-ppo]", "ppo.steps=512", "ppo.envs=4", "ppo.rollout=64", "ppo.batch=64"],
    "scheduler": "pbt",
    "space": {"ppo.learning_rate": {"loguniform": [1e-4, 1e-2]}, "weight.chat": {"choice": [1.0, 2.0]}},
}
SEARCH = SMALL | {
    "description": "A search.",
    "set": ["algorithms=[ars]", "search.generations=4"],
    "space": {"search.sigma": {"uniform": [0.05, 0.3]}},
}


def write(folder: Path, data: dict[str, Any]) -> Path:
    (folder / "space.yaml").write_text(yaml.safe_dump(data | {"training": str(training_file(folder))}))
    return folder / "space.yaml"


@pytest.mark.parametrize("data", [SEARCH, PPO], ids=["search", "ppo"])
def test_trials_are_ranked(data: dict[str, Any], ray_cluster: Any, tmp_path: Path) -> None:
    assert steersman("tune", write(tmp_path, data), "--out", tmp_path / "out") == 0
    (folder,) = (tmp_path / "out").iterdir()
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    worths = [float(row["worth"]) for row in rows]
    assert len(rows) == 2
    assert worths == sorted(worths, reverse=True)
    assert yaml.safe_load((folder / "best.yaml").read_text())["worth"] == worths[0]
    assert len(list((folder / "tensorboard").glob("*/events.out.tfevents.*"))) == 2


def tuned(folder: Path, data: dict[str, Any], *arguments: str) -> Path:
    """The folder of a finished tuning."""
    assert steersman("tune", write(folder, data), "--out", folder / "out", *arguments) == 0
    (made,) = (folder / "out").iterdir()
    return made


def test_a_heuristic_is_tuned_and_compared_with_itself_as_shipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tuned(tmp_path, HEURISTIC)
    assert "the best of them: --policy 'push-shed?strict_tpot_s=" in capsys.readouterr().out
    rows = {row["trial"]: row for row in csv.DictReader((folder / "trials.csv").read_text().splitlines())}
    shipped = resolve("push-shed")
    assert [float(rows["shipped"][name]) for name in shipped.params] == shipped.values.tolist()
    assert [float(rows["tuned"][name]) for name in shipped.params] == stages(folder)["tune-push-shed"]["values"]
    assert rows["tuned"]["rounds"] == "3"
    assert len(list((folder / "tensorboard").glob("*/events.out.tfevents.*"))) == 2


def test_only_what_the_space_names_is_varied(tmp_path: Path) -> None:
    folder = tuned(tmp_path, HEURISTIC | {"space": {"kv_reserve": {"uniform": [0.2, 0.3]}}})
    changed = dict(zip(resolve("push-shed").params, stages(folder)["tune-push-shed"]["values"], strict=True))
    assert 0.2 <= changed.pop("kv_reserve") <= 0.3
    assert changed.items() <= {name: param.default for name, param in resolve("push-shed").params.items()}.items()


def test_an_interrupted_heuristic_s_tuning_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    def interrupted(self: Arena, *arguments: Any, **named: Any) -> Any:
        if list(tmp_path.glob("out/*/checkpoints/tune-push-shed.npy")):
            raise KeyboardInterrupt
        return values(self, *arguments, **named)

    values = Arena.values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arena, "values", interrupted)
        assert steersman("tune", write(tmp_path, HEURISTIC), "--out", tmp_path / "out") == 130
    (folder,) = (tmp_path / "out").iterdir()
    assert steersman("tune", "--resume", folder) == 0
    (tmp_path / "whole").mkdir()
    assert stages(folder) == stages(tuned(tmp_path / "whole", HEURISTIC))


@pytest.mark.parametrize("path", list(config_files("tuning")), ids=lambda path: path.stem)
def test_shipped_spaces_are_right(path: Path) -> None:
    load_tuning(str(path), [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"jitter": {"uniform": [0, 1]}}}, "policy 'push-shed' has no parameter 'jitter'"),
        ({"space": {"kv_reserve": {"choice": [1.0]}}}, "space.kv_reserve: a heuristic's numbers are searched"),
        ({"policy": "round-robin"}, "policy 'round-robin' has no parameters to tune"),
        ({"trials": 3}, "'trials' is for trainings"),
        ({"policy": None, "space": {"search.sigmas": {"uniform": [0, 1]}}}, "did you mean 'sigma'?"),
        ({"policy": None, "space": {"search.sigma": {"uniform": [1, 0]}}}, "low below high"),
        ({"policy": None, "space": {"search.sigma": {}}}, "give one of uniform, loguniform"),
        ({"policy": None}, "needs `space`"),
        (SEARCH | {"policy": None, "scheduler": "pbt"}, "pbt is for ppo"),
    ],
)
def test_mistakes_are_one_sentence(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steersman("tune", write(tmp_path, HEURISTIC | changes), "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_tuning_goes_on(ray_cluster: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steersman.cli", "tune", write(tmp_path, SEARCH), "--out", tmp_path / "out"]
    driver = subprocess.Popen([*map(str, command), "--ray", ray_cluster.address], stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/*/trials/experiment_state-*.json")):
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    (folder,) = (tmp_path / "out").iterdir()
    assert not (folder / "trials.csv").exists()
    assert steersman("tune", "--resume", folder) == 0
    assert len((folder / "trials.csv").read_text().splitlines()) == 3


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    (tmp_path / "trials").mkdir()
    for name in ("tuner.pkl", "callback_states-1.pkl"):
        (tmp_path / "trials" / name).write_bytes(pickle.dumps(name))
    (tmp_path / "trials" / "experiment_state-1.json").write_text("{}")
    return tmp_path / "trials"


def test_a_half_written_state_gives_way_to_the_one_before(trials: Path) -> None:
    keep(trials)
    (trials / "callback_states-1.pkl").write_bytes(b"")
    keep(trials)
    assert recover(trials)
    assert pickle.loads((trials / "callback_states-1.pkl").read_bytes()) == "callback_states-1.pkl"


def test_a_tuning_killed_before_its_first_result_starts_anew(trials: Path) -> None:
    (trials / "experiment_state-1.json").write_text("{")
    assert not recover(trials)
    assert not trials.exists()


def test_a_folder_of_something_else_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steersman("tune", "--resume", tmp_path) == 2
    assert "not a folder of a tuning" in capsys.readouterr().err
