"""How much is tuned, learned and played."""

from __future__ import annotations

from pydantic import Field

from steersman.runtime.config import Model

# First seeds of held-out episodes, which nothing else plays: training has 0 to 2,000,000 and their parts.
HELD_OUT = 6_000_000

CAPACITY_LOADS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8, 2.0, 2.4, 2.8)
GOODPUT_LOADS = (0.8, 1.0, 1.2, 1.5)


class Budget(Model):
    """The full benchmark. One budget of simulated episodes for all: each tuned heuristic, and the learned policy."""

    population: int = Field(default=16, ge=4, description="candidates of a generation of a search")
    generations: int = Field(default=288, ge=4)
    episodes: int = Field(default=6, ge=1, description="episodes that each candidate of a generation plays")
    pool: int = Field(default=192, ge=1, description="training episodes to draw from")
    variants: int = Field(default=24, ge=1, description="of workload and fleet, in a part of these episodes")
    imitation_episodes: int = Field(default=9, ge=1)
    imitation_epochs: int = Field(default=12, ge=1)
    validation_episodes: int = Field(default=12, ge=1)
    training_seeds: int = Field(default=3, ge=0, description="learned policies, each from a seed of its own")
    seeds: int = Field(default=32, ge=2, description="held-out episodes at each load")
    first_seed: int = Field(default=HELD_OUT, ge=0)
    loads: tuple[float, ...] = Field(
        default=CAPACITY_LOADS,
        min_length=2,
        description="where capacity is looked for, times that of the best heuristic as shipped",
    )
    goodput_loads: tuple[float, ...] = Field(
        default=GOODPUT_LOADS,
        min_length=1,
        description="where goodput is compared, times the best heuristic's capacity",
    )

    @property
    def teacher_generations(self) -> int:
        """Of the budget of a learned policy, those that go into tuning its teacher: a third."""
        return max(1, self.generations // 3)

    @property
    def guessed_generations(self) -> int:
        """A twelfth: those in which a learned policy finds what to do where SLOs are guesses."""
        return max(1, self.generations // 12)

    @property
    def evaluations(self) -> int:
        """Simulated episodes that one policy's search may take in all."""
        return self.population * self.generations * self.episodes


FULL = Budget()
# The same tables within three minutes on two cores.
QUICK = Budget(
    population=8,
    generations=12,
    episodes=4,
    pool=24,
    variants=8,
    imitation_episodes=6,
    validation_episodes=6,
    seeds=8,
    loads=(0.2, 0.5, 0.7, 0.85, 1.0, 1.15, 1.35, 1.6, 2.0, 2.4, 2.8),
)
QUICK_SCENARIOS = ("default", "steady", "shift-bursty")
