"""`algorithm: rllib-ppo`: the network of SB3's PPO, masks, the same curves and bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cluster import FLEET, WORKLOAD, steersman
from test_cluster_train import training_file
from test_train import only_run

from steersman.envs.dispatch import DispatchEnv
from steersman.runtime.bundle import open_bundle
from steersman.runtime.network import Architecture, parameters

pytest.importorskip("ray.rllib")

from ray.rllib.core.columns import Columns

from steersman.agents.rllib import NEVER, ScorerModule
from steersman.training.rllib import Masked


@pytest.fixture(scope="module")
def env() -> Masked:
    return Masked(DispatchEnv(WORKLOAD, FLEET))


@pytest.fixture(scope="module")
def module(env: Masked) -> ScorerModule:
    architecture = Architecture()
    made = ScorerModule(
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config={"architecture": architecture.model_dump(mode="json"), "sharpness": 2.0},
    )
    made.scorer.set_weights(np.random.default_rng(0).normal(size=parameters(architecture)))
    return made


def batch(env: Masked) -> dict[str, Any]:
    seen, _ = env.reset(seed=0)
    return {Columns.OBS: {name: torch.from_numpy(value)[None] for name, value in seen.items()}}


def test_logits_are_the_scorer_s_where_the_mask_allows(env: Masked, module: ScorerModule) -> None:
    given = batch(env)
    given[Columns.OBS]["action_mask"][0, 0] = 0
    logits = module.forward_inference(given)[Columns.ACTION_DIST_INPUTS][0]
    rows = given[Columns.OBS]["observations"].reshape(len(logits), -1)
    with torch.no_grad():
        scores = 2.0 * module.scorer(rows)
    assert logits[0] == NEVER
    assert torch.equal(logits[1:], scores[1:])


def test_values_are_the_same_from_embeddings(env: Masked, module: ScorerModule) -> None:
    given = batch(env)
    embeddings = module.forward_train(given)[Columns.EMBEDDINGS]
    assert torch.equal(module.compute_values(given, embeddings), module.compute_values(given))


def test_runners_play_episodes_of_their_own() -> None:
    """RLlib seeds the first environment of runner 2 like the second one of runner 1."""
    seen = [Masked(DispatchEnv(WORKLOAD, FLEET), runner).reset(seed=2)[0]["observations"] for runner in (1, 2)]
    assert not np.array_equal(*seen)


@pytest.mark.filterwarnings("ignore")  # RLlib's own
def test_a_run_exports_a_bundle_and_leaves_its_curves(ray_cluster: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sets = ("algorithms=[rllib-ppo]", "ppo.steps=512", "ppo.envs=4", "ppo.rollout=64", "ppo.batch=64")
    changes = [part for one in sets for part in ("--set", one)]
    assert steersman("train", training_file(tmp_path), "--runs", tmp_path / "runs", *changes) == 0
    run = only_run(tmp_path / "runs")
    assert open_bundle(run).manifest.architecture == Architecture()
    assert (run / "checkpoints" / "rllib-ppo.pt").exists()
    events = EventAccumulator(str(run / "rllib-ppo")).Reload()
    assert {"train/loss/value", "train/explained_variance"} <= set(events.Tags()["scalars"])


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_runners_exports_a_bundle(ray_cluster: Any, tmp_path: Path) -> None:
    sets = ("algorithms=[rllib-ppo]", "ppo.steps=512", "ppo.envs=4", "ppo.rollout=64", "ppo.batch=64", "ppo.runners=2")
    changes = [part for one in sets for part in ("--set", one)]
    assert steersman("train", training_file(tmp_path), "--runs", tmp_path / "runs", *changes) == 0
    assert open_bundle(only_run(tmp_path / "runs")).manifest.architecture == Architecture()


@pytest.mark.filterwarnings("ignore")
def test_it_goes_on_from_its_checkpoint(ray_cluster: Any, tmp_path: Path) -> None:
    """With all steps done and only the result of the stage lost, the same weights are found without another step."""
    sets = ("algorithms=[rllib-ppo]", "ppo.steps=256", "ppo.envs=4", "ppo.rollout=64", "ppo.batch=64")
    changes = [part for one in sets for part in ("--set", one)]
    assert steersman("train", training_file(tmp_path), "--runs", tmp_path / "runs", *changes) == 0
    run = only_run(tmp_path / "runs")
    stage = run / "stages" / "rllib-ppo.json"
    before = stage.read_text()
    stage.unlink()
    assert steersman("train", "--resume", run) == 0
    assert stage.read_text() == before
