"""`Steersman/Dispatch-v0`: one decision a step over a simulated cluster, or over real replicas in real time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from steersman.envs.batch import step
from steersman.envs.episodes import Episodes
from steersman.envs.metrics import episode_metrics
from steersman.envs.render import ansi, rgb_array
from steersman.envs.reward import REWARD, Reward, find_reward
from steersman.envs.spaces import action_space, observation_space
from steersman.runtime.compiled import address_of
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.outcomes import Episode, Outcomes, State
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import Split, Workload

RUNTIMES = ("simulated", "live")


class Runtime(Protocol):
    """What the environment needs of a runtime: the face of `SimulatedRuntime` and `LiveRuntime`."""

    rows: np.ndarray  # float32 (C, WIDTH)
    mask: np.ndarray  # bool (C,)
    candidates: int

    @property
    def now(self) -> float: ...
    @property
    def ended(self) -> np.ndarray: ...
    @property
    def episode(self) -> Episode: ...
    def reset(self, requests: Requests) -> None: ...
    def advance(self) -> bool: ...
    def step(self, action: int) -> bool: ...
    def outcomes(self) -> Outcomes: ...
    def close(self) -> None: ...


class DispatchEnv(gym.Env[np.ndarray, np.integer]):
    """Where does the request that has just arrived go?

    Observation: float32 (C · WIDTH,), the rows of `steersman.runtime.observation` one after the other: R replicas,
    padding, *hold* and *shed*; `observation.reshape(-1, WIDTH)` is the table (C, WIDTH). Raw quantities in the units
    given there. It is flat because Stable-Baselines3 takes flat vectors only.
    Action: Discrete(C). A replica's index sends it there; the last two hold it, to be decided anew after a pause, and
    shed it. An action that the guard masks sheds too: `action_masks()` and `info["action_mask"]` say which are allowed.
    Reward: the sum over requests that ended since the last step of what the reward says they are worth.
    Termination: every request of the episode has ended; then `info["metrics"]` has the figures of the episode, and
    the observation is zero. Never truncated.

    `reset(options={"load": 1.2})` sets the load of one episode; `options={"requests": r}` plays given `Requests`.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(
        self,
        workload: str | Path | Workload = "default",
        fleet: str | Path | Fleet = "default",
        *,
        runtime: str = "simulated",
        reward: str | Reward = "slo",
        load: float | tuple[float, float] = 1.0,
        duration_s: float | None = None,
        split: Split = "train",
        candidates: int | None = None,
        traces: Path | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        workload, fleet: a name, a file or the object. runtime: `simulated`, or `live` for the fleet's backends.
        load: multiplies the workload's rate; a pair is a range to draw from. duration_s: length of an episode.
        candidates: C, at least replicas + 2 (the default); more leaves room for padding.

        Raises:
            UserError: an argument names nothing that exists, or workload and fleet do not fit.
        """
        self._episodes = Episodes(workload, fleet, load=load, duration_s=duration_s, split=split, traces=traces)
        self.workload, self.fleet = self._episodes.workload, self._episodes.fleet
        self.reward = find_reward(reward)
        self.runtime = _open(runtime, self.fleet, candidates)
        self.observation_space = observation_space(self.runtime.candidates)
        self.action_space = action_space(self.runtime.candidates)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UserError(f"render_mode {render_mode!r}: expected ansi or rgb_array")
        self.render_mode = render_mode
        self._promises: list[tuple[float, float, float]] = []
        self._tenants = np.zeros(0)
        self._row, self._mask = self.runtime.rows.reshape(-1), self.runtime.mask
        self._play: Callable[[int], tuple[bool, float, float]] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        options = options or {}
        requests = options.get("requests")
        if requests is None:
            requests = self._episodes.draw(self.np_random, options.get("load"))
        self._tenants = requests.table["tenant"]
        self._promises = [(t.slo.ttft_s, t.slo.tpot_s, t.weight) for t in requests.tenants.values()]
        self.runtime.reset(requests)
        if not self.runtime.advance():
            raise UserError("the episode has no request: make it longer, or raise the load")
        self._play = self._stepper()
        return self._row.copy(), {"action_mask": self.action_masks(), "time_s": self.runtime.now}

    def step(self, action: np.integer | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._play is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        due, reward, now = self._play(int(action))
        info: dict[str, Any] = {"action_mask": self._mask.copy(), "time_s": now}
        if due:
            return self._row.copy(), reward, False, False, info
        info["metrics"] = self.metrics()
        self._play = None
        return np.zeros_like(self._row), reward, True, False, info

    def _stepper(self) -> Callable[[int], tuple[bool, float, float]]:
        """`runtime.step` for this episode, with the reward and the time: one compiled call where it is simulated."""
        runtime = self.runtime
        if isinstance(runtime, SimulatedRuntime):
            worth = address_of(self.reward.worth, REWARD)
            return functools.partial(step, runtime.address, worth)
        return lambda action: (runtime.step(action), self._earned(), runtime.now)

    def _earned(self) -> float:
        o, worth, total = self.runtime.outcomes(), self.reward.worth, 0.0
        for i in self.runtime.ended:
            promise = self._promises[self._tenants[i]]
            shed = float(o.state[i] == State.SHED)
            total += worth(float(o.attained[i]), shed, o.ttft_s[i], o.tpot_s[i], *promise)
        return total

    def action_masks(self) -> np.ndarray:
        """bool (C,): what the guard allows. The name is the one that `sb3_contrib.MaskablePPO` asks for."""
        return self.runtime.mask.copy()

    def metrics(self) -> dict[str, float]:
        """Figures of the episode so far: attainment by tenant, goodput, percentiles, utilisation."""
        return episode_metrics(self.runtime.episode, self.fleet)

    def render(self) -> str | np.ndarray | None:
        """Queues, batches and KV use of each replica: text, or uint8 (height, width, 3)."""
        if self.render_mode == "ansi":
            return ansi(self.runtime.rows, self.fleet.names, self.runtime.now)
        if self.render_mode == "rgb_array":
            return rgb_array(self.runtime.rows, self.fleet.names, self.runtime.now)
        return None

    def close(self) -> None:
        self.runtime.close()


def _open(runtime: str, fleet: Fleet, candidates: int | None) -> Runtime:
    if runtime == "simulated":
        return SimulatedRuntime(fleet, candidates)
    if runtime == "live":
        from steersman.runtime.replica._live import LiveRuntime

        return LiveRuntime(fleet, candidates)
    raise UserError(f"runtime {runtime!r}: expected {' or '.join(RUNTIMES)}")
