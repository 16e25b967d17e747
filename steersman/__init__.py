"""Steersman trains schedulers for LLM inference by reinforcement learning, and runs them in production."""

__version__ = "0.1.0"
