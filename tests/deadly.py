"""For workers of a cluster, which import this module by its name."""

from __future__ import annotations

import os
import signal

from steersman.runtime.outcomes import Episode


def kills(episode: Episode) -> float:
    """A score that no worker survives."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def cuts_off(episode: Episode) -> float:
    """A score after which the worker gets no object any more, as one whose node is being killed."""
    import ray

    def get(*_: object, **__: object) -> None:
        raise BrokenPipeError("Broken pipe")

    ray.get = get
    return 0.0
