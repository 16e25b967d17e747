"""The simulator: a cluster of continuous-batching engines, compiled."""

from steersman.runtime.simulator.simulator import SimulatedRuntime

__all__ = ["SimulatedRuntime"]
