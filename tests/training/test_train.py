"""The training job at the command line: a small run, its artefacts, interruption and resumption, bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from steersman import cli
from steersman.envs.sb3 import SB3VecEnv
from steersman.runtime.bundle import open_bundle
from steersman.runtime.config import apply_sets, read_yaml, validate
from steersman.runtime.network import Architecture, behind, unpack
from steersman.runtime.policy import CompiledPolicy
from steersman.training import ppo
from steersman.training.config import TrainingConfig
from steersman.training.counterfactual import Situations
from steersman.training.job import Job
from steersman.training.objective import Arena
from steersman.training.run import Run
from steersman.training.situations import SituationsEnv

FLEET = {
    "description": "Two unlike replicas.",
    "replicas": [
        {
            "name": "fast",
            "profile": "llama-3.1-8b-h100-bf16",
            "kv_tokens": 20000,
            "max_num_seqs": 16,
            "token_budget": 256,
        },
        {
            "name": "slow",
            "profile": "llama-3.1-8b-l40s-bf16",
            "kv_tokens": 20000,
            "max_num_seqs": 16,
            "token_budget": 256,
        },
    ],
}
WORKLOAD = {
    "description": "Two tenants.",
    "duration_s": 8,
    "tenants": {
        name: {
            "slo": {"ttft_s": ttft, "tpot_s": tpot},
            "source": {
                "kind": "synthetic",
                "rate_rps": 10,
                "prompt_tokens": {"lognormal": {"median": 300, "sigma": 0.6, "max": 2000}},
                "output_tokens": {"lognormal": {"median": 30, "sigma": 0.4, "max": 100}},
                "max_tokens": 100,
            },
        }
        for name, ttft, tpot in (("chat", 0.3, 0.03), ("batch", 3.0, 0.2))
    },
}
TRAINING = {
    "description": "A small run.",
    "compare": ["jsed", "least-requests", "push-shed"],
    "algorithms": ["cma-es", "ars", "maskable-ppo"],
    "variants": {"count": 2, "share": 0.5},
    "search": {"population": 4, "generations": 3, "episodes": 2, "pool": 6, "guessed": 2},
    "imitation": {"episodes": 2, "epochs": 2, "batch": 64},
    "ppo": {"steps": 512, "envs": 4, "rollout": 64, "batch": 64, "tried_episodes": 2, "tried_decisions": 10},
    "validation_episodes": 3,
    "held_out_episodes": 3,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    for name, data in (("fleet", FLEET), ("workload", WORKLOAD)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    path = folder / "small.yaml"
    files = {"workload": str(folder / "workload.yaml"), "fleet": str(folder / "fleet.yaml")}
    path.write_text(yaml.safe_dump(TRAINING | files))
    return path


def steersman(*arguments: str | Path) -> int:
    """The command's exit code, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["steersman", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0)


def only_run(runs: Path) -> Path:
    (run,) = runs.iterdir()
    return run


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert steersman("train", config, "--runs", runs) == 0
    return only_run(runs)


def stage(run: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "stages" / f"{name}.json").read_text())
    return found


def test_a_run_exports_a_bundle_with_its_scorecard(run: Path) -> None:
    manifest = open_bundle(run).manifest
    assert manifest.fleet["description"] == FLEET["description"]
    assert manifest.command.startswith("steersman train")
    names = [policy["policy"] for policy in json.loads((run / "comparison.json").read_text())["policies"]]
    learned = [f"learned ({name})" for name in ("imitation", "cma-es", "ars", "maskable-ppo")]
    assert names == ["jsed", "least-requests", "push-shed", "push-shed-tuned", "push-hold-shed-tuned", *learned]
    assert manifest.name in learned
    assert manifest.scorecard["learned"] == manifest.name
    assert {open_bundle(path).manifest.name for path in (run / "learned").iterdir()} == set(learned)
    assert {path.stem for path in (run / "figures").glob("*.png")} >= {"goodput", "attainment", "ttft_cdf", "tpot_cdf"}


def test_every_algorithm_leaves_its_curves(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for algorithm in ("cma-es", "ars", "maskable-ppo", "best-heuristic"):
        events = EventAccumulator(str(run / algorithm)).Reload()
        assert events.Scalars("slo/attainment/chat")[-1].step == 1000
    assert len(EventAccumulator(str(run / "maskable-ppo")).Reload().Scalars("train/loss/value")) >= 1


def test_the_tuned_heuristic_and_the_learned_policy_have_one_budget(run: Path) -> None:
    names = ("tune-push-shed", "tune-push-hold-shed", "cma-es", "ars")
    assert {stage(run, name)["episodes"] for name in names} == {4 * 3 * 2}


def test_what_is_done_where_slos_are_guesses_is_learned_last_and_changes_nothing_else(run: Path) -> None:
    found, winner = stage(run, "guesses"), open_bundle(run).manifest.name.removeprefix("learned (").removesuffix(")")
    own = behind(Architecture(), "slo_guessed")
    before, after = np.array(stage(run, winner)["weights"]), np.array(found["weights"])
    assert not before[own].any()
    assert (before[~own] == after[~own]).all()
    worths = found["worths"]
    assert isinstance(worths, list)
    assert after[own].any() == (worths[1] > worths[0])
    assert unpack(open_bundle(run).compiled.values)[1] == pytest.approx(after, rel=1e-6)


def test_the_scorer_imitates_the_teacher_in_its_tuned_form(run: Path) -> None:
    assert stage(run, "imitation")["teacher"] == "push-hold-shed-tuned"


def test_the_run_is_a_policy_for_evaluation(run: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workload", config.parent / "workload.yaml", "--fleet", config.parent / "fleet.yaml")
    policies = ("--policy", run, "--policy", "jsed", "--policy", "jsed?decode_weight=0")
    assert steersman("evaluate", *policies, *where, "--episodes", "2", "--json") == 0
    shown = json.loads(capsys.readouterr().out)["policies"]
    assert [p["policy"] for p in shown] == [open_bundle(run).manifest.name, "jsed #2", "jsed #3"]
    assert len({p["arrived"] for p in shown}) == 1
    assert steersman("evaluate", *policies, *where, "--episodes", "2") == 0
    assert "jsed #2" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_to_the_same_policy(
    run: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped over and over, each time later: the search ends at the same weights, byte for byte."""
    played, stops, values = 0, {2, 5, 8, 12, 17}, Arena.values

    def interrupted(self: Arena, policies: Sequence[CompiledPolicy], *arguments: object, **named: object) -> np.ndarray:
        nonlocal played
        played += 1
        if played in stops:
            raise KeyboardInterrupt
        return values(self, policies, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Arena, "values", interrupted)
    code = steersman("train", config, "--runs", tmp_path)
    attempts = 0
    while code == 130:
        resumed = only_run(tmp_path)
        assert f"steersman train --resume {resumed}" in capsys.readouterr().out.replace("\n", "")
        code = steersman("train", "--resume", resumed)
        attempts += 1
    assert code == 0
    assert attempts == len(stops)
    for name in ("sizing", "tune-push-shed", "imitation", "cma-es"):
        assert stage(only_run(tmp_path), name) == stage(run, name)


def resumed_at(config: Path, folder: Path, change: str, ends: tuple[int, int]) -> None:
    """MaskablePPO with a change to the training file, to one number of steps, and from there to another."""
    for steps in ends:
        sets = [change, f"ppo.steps={steps}"]
        settings = validate(TrainingConfig, apply_sets(read_yaml(config), sets), "test")
        job = Job(Run(folder, settings), Console(quiet=True), None)
        assert ppo.learn(job, "maskable-ppo", None)["steps"] == steps
        job.close()


def test_a_resumed_ppo_plays_other_episodes_than_those_it_began_with(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, reset = [], SB3VecEnv.reset

    def recorded(self: SB3VecEnv) -> Any:
        begun.append(set(self._seeds))
        return reset(self)

    monkeypatch.setattr(SB3VecEnv, "reset", recorded)
    resumed_at(config, tmp_path, "ppo.advantages=gae", (256, 512))
    assert not begun[0] & begun[1]


def test_a_resumed_ppo_tries_other_decisions_than_those_it_began_with(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, refresh = [], SituationsEnv.refresh

    def recorded(self: SituationsEnv, weights: np.ndarray, number: int) -> Situations:
        begun.append(number)
        return refresh(self, weights, number)

    monkeypatch.setattr(SituationsEnv, "refresh", recorded)
    resumed_at(config, tmp_path, "ppo.refresh=1", (512, 1024))
    assert begun == [0, 256, 512, 768]


@pytest.mark.parametrize("kind", ["heuristics", "workloads", "fleets"])
def test_lists_have_a_sentence_each(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = "policies" if kind == "heuristics" else kind
    assert steersman(command) == 0
    rows = [row for row in capsys.readouterr().out.strip().splitlines()[1:] if not row.startswith(" ")]
    assert len(rows) >= 3
    assert all(len(row.split(maxsplit=3)) == 4 for row in rows)  # a name, and the beginning of a sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nothing.yaml"), "nothing.yaml: no such file"),
        (("train", "defualt"), "did you mean 'default'?"),
        (("train", "--set", "search.generatoins=3"), "'search.generatoins'; did you mean 'generations'?"),
        (("train", "--set", "search.generations=none"), "'search.generations'"),
        (("train", "--resume", "."), "not a run folder"),
        (("train", "azure", "--traces", "/nowhere"), "no such trace file"),
        (("train", "--set", "reward=sol"), "did you mean 'slo'?"),
        (("train", "--set", "tune=[push-sehd]"), "did you mean 'push-shed'?"),
        (("train", "--set", "fleet=local"), "fit no replica"),
        (("evaluate", "--policy", "jsde"), "did you mean 'jsed'?"),
        (("evaluate", "--policy", "./nowhere"), "nowhere"),
        (("evaluate", "--fleet", "local"), "fit no replica"),
        (("evaluate", "--workload", "azure", "--traces", "/nowhere"), "no such trace file"),
        (("serve", "--fleet", "default"), "no backend"),
        (("serve", "--policy", "./nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ("--runs", str(tmp_path)) if arguments[0] == "train" and "--resume" not in arguments else ()
    assert steersman(*arguments, *where) == 2
    told = capsys.readouterr().err
    assert told.startswith("steersman: ")
    assert message in told
    assert len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())
