"""What the environment costs under RLlib: `steersman bench rllib`.

Iterations of `rllib-ppo` and of RLlib's PPO on CartPole, with its own network and the same numbers of environments,
frames and minibatches, take turns in one process, without actors; CPU time counts.
"""

from __future__ import annotations

import io
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS
from rich.console import Console

from steersman.training.bench.machine import machine
from steersman.training.cluster.connect import LOCAL, joined
from steersman.training.config import TrainingConfig
from steersman.training.job import Job
from steersman.training.rllib import algorithm_of, numbers
from steersman.training.run import Run


def bench(rounds: int, console: Console) -> dict[str, Any]:
    """Frames per CPU second of both and their ratio, as the one JSON object that the command prints.

    A frame is a step of one environment; a round an iteration of either.
    """
    torch.set_num_threads(1)
    config = TrainingConfig(description="")
    with joined(LOCAL, console, 1), tempfile.TemporaryDirectory() as folder:
        job = Job(Run(Path(folder), config), Console(file=io.StringIO()), None)
        with console.status("measuring …"):
            both = [algorithm_of(job, 0), numbers(config.ppo, 0).environment("CartPole-v1").build_algo()]
            frames, seconds = [0, 0], [0.0, 0.0]
            for number in range(rounds + 1):
                for k in (0, 1) if number % 2 else (1, 0):
                    started = time.process_time()
                    result = both[k].train()
                    if number:  # the first is for the compiler and caches
                        seconds[k] += time.process_time() - started
                        frames[k] += int(result[ENV_RUNNER_RESULTS]["num_env_steps_sampled"])
        for one in both:
            one.stop()
        job.close()
    ours, theirs = (frames[k] / seconds[k] for k in (0, 1))
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("steersman", "ray", "gymnasium", "torch", "numpy")},
        "rounds": rounds,
        "envs": config.ppo.envs,
        "frames": frames[0],
        "frames_per_cpu_s": ours,
        "cartpole_frames_per_cpu_s": theirs,
        "ratio": ours / theirs,
    }
