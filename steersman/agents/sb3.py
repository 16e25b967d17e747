"""The shared scorer as a Stable-Baselines3 policy, for PPO and MaskablePPO.

The scorer gives one logit a candidate. The critic pools: the mean over candidates of an embedding of each row, then
two layers. Rows that are padding never count; for PPO, which knows no masks, they get a logit of −1e8.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from steersman.agents.scorer import Scorer, candidates
from steersman.runtime.network import Architecture
from steersman.runtime.observation import WIDTH

VALUE_WIDTH = 64


class ScorerExtractor(BaseFeaturesExtractor):
    """Observation (B, C · WIDTH) → (B, C + VALUE_WIDTH): a logit a candidate, then the critic's features.

    sharpness: what multiplies scores to make logits. A policy that draws its actions learns what suits a policy that
    draws; the one that is exported takes the best score. The sharper, the less the two differ.
    """

    def __init__(self, observation_space: gym.Space, architecture: Architecture, sharpness: float) -> None:
        assert observation_space.shape is not None
        self.candidates = observation_space.shape[0] // WIDTH
        super().__init__(observation_space, self.candidates + VALUE_WIDTH)
        self.scorer = Scorer(architecture)
        self.sharpness = sharpness
        self.embed = nn.Linear(WIDTH, VALUE_WIDTH)
        self.value = nn.Linear(VALUE_WIDTH, VALUE_WIDTH)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        observations = observations.reshape(*observations.shape[:-1], self.candidates, WIDTH)
        real = candidates(observations)
        logits = (self.sharpness * self.scorer(observations)).masked_fill(~real, -1e8)
        embedded = torch.tanh(self.embed(self.scorer.normalise(observations)))
        weights = real.to(embedded.dtype).unsqueeze(-1)
        pooled = (embedded * weights).sum(-2) / weights.sum(-2)
        return torch.cat([logits, torch.tanh(self.value(pooled))], dim=-1)


class _Split(nn.Module):
    """Parts the extractor's output into the actor's logits and the critic's features."""

    def __init__(self, candidates: int) -> None:
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = candidates, VALUE_WIDTH

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., : self.latent_dim_pi]

    def forward_critic(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., self.latent_dim_pi :]


class _ScorerMixin:
    """What the two SB3 policies share: the scorer's logits are the action logits, with no layer after them."""

    # What SB3 makes of them: declared for both base classes, which type them in their own ways.
    features_extractor: Any
    mlp_extractor: Any
    action_net: Any
    optimizer_class: Any
    optimizer_kwargs: dict[str, Any]

    def __init__(
        self, *args: Any, architecture: Architecture | None = None, sharpness: float = 1.0, **kwargs: Any
    ) -> None:
        kwargs.update(
            features_extractor_class=ScorerExtractor,
            features_extractor_kwargs={"architecture": architecture or Architecture(), "sharpness": sharpness},
            ortho_init=False,  # the scorer may come with weights
        )
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Split(self.features_extractor.candidates)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)  # type: ignore[misc]
        self.action_net = nn.Identity()
        # Anew, without the parameters of the layer that was just replaced.
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[attr-defined]

    @property
    def scorer(self) -> Scorer:
        scorer: Scorer = self.features_extractor.scorer
        return scorer


class ScorerPolicy(_ScorerMixin, ActorCriticPolicy):
    """For `stable_baselines3.PPO`."""


class MaskableScorerPolicy(_ScorerMixin, MaskableActorCriticPolicy):
    """For `sb3_contrib.MaskablePPO`."""
