"""The three forms of the learned scorer agree."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from encoded import situations

from steersman.agents.scorer import Scorer
from steersman.runtime.errors import UserError
from steersman.runtime.network import Architecture, compiled_policy, parameters
from steersman.runtime.observation import WIDTH
from steersman.runtime.policy import pick
from steersman.runtime.serving import OnnxPolicy
from steersman.training.export import onnx_graph

ARCHITECTURES = [Architecture(), Architecture(hidden=(32,)), Architecture(hidden=(64, 64))]
CLOSE = 1e-5  # of the largest score: such a tie may fall either way in float32


def random_weights(architecture: Architecture, seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).normal(size=parameters(architecture))
    return weights.astype(np.float32).astype(np.float64)


def scorer(architecture: Architecture, seed: int = 0) -> Scorer:
    made = Scorer(architecture)
    made.set_weights(random_weights(architecture, seed))
    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_compiled_torch_and_onnx_choose_alike(architecture: Architecture, seed: int) -> None:
    weights = random_weights(architecture, seed)
    compiled = compiled_policy(architecture, weights, "learned").bind()
    network = scorer(architecture, seed)
    served = OnnxPolicy("learned", onnx_graph(architecture, weights), "here")
    chosen = set()
    for rows, mask in situations(1500, seed):
        exact = compiled.score(rows, mask)
        with torch.no_grad():
            others = [network(torch.from_numpy(rows)).numpy(), served.score(rows, mask)]
        best = pick(exact, mask)
        chosen.add(best == len(rows) - 1)
        for scores in others:
            lost = exact[best] - exact[pick(scores, mask)]
            assert lost <= CLOSE * np.abs(exact[mask]).max()
    assert chosen == {False, True}  # it both sent and shed


def test_weights_survive_the_way_through_torch() -> None:
    for architecture in ARCHITECTURES:
        assert (scorer(architecture).get_weights() == random_weights(architecture)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_other_steps_leave_the_weights(architecture: Architecture) -> None:
    network = scorer(architecture)
    size = network.coordinates.numel()
    basis = np.eye(size) + np.random.default_rng(0).normal(size=(size, size)) / size
    network.step_along(basis)
    assert network.get_weights() == pytest.approx(random_weights(architecture), abs=1e-5)
    with torch.no_grad():
        network.coordinates[3] += 1
    moved = network.get_weights() - random_weights(architecture)
    assert moved[:size] == pytest.approx(basis[:, 3], abs=1e-5)


def test_a_new_scorer_is_indifferent() -> None:
    rows, _ = next(situations(1))
    assert (Scorer(ARCHITECTURES[2])(torch.from_numpy(rows)) == 0).all()


def test_a_batch_scores_as_its_members_do() -> None:
    network = scorer(ARCHITECTURES[1])
    batch = torch.from_numpy(np.stack([rows[:2] for rows, _ in situations(6)])).reshape(2, 3, 2, WIDTH)
    together = network(batch)
    assert together.shape == (2, 3, 2)
    torch.testing.assert_close(together[1, 2], network(batch[1, 2]))


def test_every_weight_learns() -> None:
    network = scorer(ARCHITECTURES[2])
    network(torch.from_numpy(np.concatenate([rows for rows, _ in situations(50)]))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_constants_are_no_part_of_the_state() -> None:
    assert sorted(Scorer(Architecture()).state_dict()) == ["basis", "coordinates"]


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(UserError, match="weights"):
        Scorer(Architecture()).set_weights(np.zeros(5))


def test_a_graph_is_the_same_bytes_each_time_and_takes_any_number_of_candidates() -> None:
    architecture = ARCHITECTURES[1]
    graph = onnx_graph(architecture, random_weights(architecture))
    assert graph == onnx_graph(architecture, random_weights(architecture))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for candidates in (1, 5, 300):
        (scores,) = session.run(None, {"rows": np.ones((candidates, WIDTH), np.float32)})
        assert scores.shape == (candidates,)


def test_a_graph_with_nan_weights_is_refused() -> None:
    weights = random_weights(Architecture())
    weights[[3, 9]] = np.nan
    with pytest.raises(UserError, match="2 of 145 weights are not finite"):
        onnx_graph(Architecture(), weights)
