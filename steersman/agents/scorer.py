"""The learned scorer in torch, for training. Its formula stands in `runtime/network.py`."""

from __future__ import annotations

import itertools
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from steersman.runtime.network import NORM_WIDTH, SCALE, Architecture, split
from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, WIDTH
from steersman.runtime.scoring import LIMIT


def candidates(observations: torch.Tensor) -> torch.Tensor:
    """bool (…, C): the rows of observations (…, C, WIDTH) that are no padding, nor a hold that is over."""
    real = observations[..., COLUMN["is_replica"]] + observations[..., COLUMN["is_hold"]] > 0
    real[..., -1] = True  # shed
    return real


class Scorer(nn.Module):
    """Scores candidates, each by itself: (…, C, WIDTH) → (…, C), float32.

    A new scorer gives every candidate the score 0: a uniform policy. The hidden layers start at random. The bilinear
    weights are `basis` @ `coordinates`, and an optimiser steps in coordinates.
    """

    scale: Tensor
    width: Tensor
    basis: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        # Constants, not weights: outside the state dict.
        self.register_buffer("scale", torch.from_numpy(SCALE).float(), persistent=False)
        self.register_buffer("width", torch.from_numpy(NORM_WIDTH).float(), persistent=False)
        size = CANDIDATE_FEATURES * (1 + len(architecture.gates))
        self.coordinates = nn.Parameter(torch.zeros(size))
        self.register_buffer("basis", torch.eye(size))
        sizes = [WIDTH, *architecture.hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.output = nn.Linear(sizes[-1], 1, bias=False) if architecture.hidden else None
        if self.output is not None:
            nn.init.zeros_(self.output.weight)

    @property
    def bilinear(self) -> Tensor:
        """(F, 1 + G)"""
        return (self.basis @ self.coordinates).reshape(CANDIDATE_FEATURES, -1)

    @property
    def linear_layers(self) -> list[nn.Linear]:
        return [cast(nn.Linear, layer) for layer in self.layers]

    def normalise(self, rows: Tensor) -> Tensor:
        """Raw observations as the network sees them, same shape."""
        z = rows / self.scale
        root = (1 + z * z).sqrt().sqrt()
        return (z / (root * root.sqrt())).clamp(-LIMIT, LIMIT) / self.width

    def gates(self, features: Tensor) -> Tensor:
        """[1, some request features] of normalised rows: (…, C, 1 + G)."""
        return torch.cat([torch.ones_like(features[..., :1]), features[..., self.architecture.gate_columns]], dim=-1)

    def inputs(self, rows: Tensor) -> Tensor:
        """What the bilinear weights multiply, in their order: (…, C, WIDTH) → (…, C, F · (1 + G))."""
        features = self.normalise(rows)
        return (features[..., :CANDIDATE_FEATURES, None] * self.gates(features)[..., None, :]).flatten(-2)

    def forward(self, rows: Tensor) -> Tensor:
        features = self.normalise(rows)
        scores = (features[..., :CANDIDATE_FEATURES] @ self.bilinear * self.gates(features)).sum(-1)
        if self.output is None:
            return scores
        for layer in self.layers:
            features = torch.tanh(layer(features))
        return scores + self.output(features).squeeze(-1)

    def get_weights(self) -> np.ndarray:
        """The trainable weights as one float64 vector, in the order of `Architecture.shapes`."""
        arrays = [self.bilinear, *(p for layer in self.linear_layers for p in (layer.weight.T, layer.bias))]
        if self.output is not None:
            arrays.append(self.output.weight)
        return torch.cat([a.detach().reshape(-1) for a in arrays]).cpu().numpy().astype(np.float64)

    def step_along(self, basis: np.ndarray) -> None:
        """Keep the weights, and let optimisers step along the columns of `basis` from now on: (B, B), of full rank."""
        weights = self.get_weights()
        self.basis.copy_(torch.from_numpy(basis))
        self.set_weights(weights)

    def set_weights(self, weights: np.ndarray) -> None:
        """Set the trainable weights from such a vector, in place.

        Raises:
            UserError: its length does not fit the architecture, or a weight is not finite.
        """
        arrays = [torch.from_numpy(np.array(a, np.float32)) for a in split(self.architecture, weights)]
        with torch.no_grad():
            self.coordinates.copy_(torch.linalg.solve(self.basis, arrays[0].flatten()))
            for i, layer in enumerate(self.linear_layers):
                layer.weight.copy_(arrays[1 + 2 * i].T)
                layer.bias.copy_(arrays[2 + 2 * i])
            if self.output is not None:
                self.output.weight.copy_(arrays[-1].reshape(1, -1))
