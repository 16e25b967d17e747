"""The shared scorer as an RLlib module, for its PPO on the new API stack: the torch code of `sb3.py`, with masks.

Observations are a dict: `observations` (B, C · WIDTH) and `action_mask` (B, C).
"""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import nn

from steersman.agents.sb3 import VALUE_WIDTH, ScorerExtractor
from steersman.agents.scorer import Scorer
from steersman.runtime.network import Architecture

NEVER = -1e8  # the logit of a masked candidate


class ScorerModule(TorchRLModule, ValueFunctionAPI):
    """model_config: {"architecture": of the scorer, as JSON; "sharpness": what multiplies scores}."""

    def setup(self) -> None:
        config: Any = self.model_config
        space: Any = self.observation_space
        architecture = Architecture.model_validate(config["architecture"])
        self.extractor = ScorerExtractor(space["observations"], architecture, config["sharpness"])
        self.value = nn.Linear(VALUE_WIDTH, 1)

    @property
    def scorer(self) -> Scorer:
        return self.extractor.scorer

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        seen = batch[Columns.OBS]
        features = self.extractor(seen["observations"])
        logits = features[..., : self.extractor.candidates].masked_fill(seen["action_mask"] == 0, NEVER)
        return {Columns.ACTION_DIST_INPUTS: logits, Columns.EMBEDDINGS: features[..., self.extractor.candidates :]}

    def compute_values(self, batch: dict[str, Any], embeddings: Any | None = None) -> torch.Tensor:
        if embeddings is None:
            embeddings = self.extractor(batch[Columns.OBS]["observations"])[..., self.extractor.candidates :]
        values: torch.Tensor = self.value(embeddings).squeeze(-1)
        return values
