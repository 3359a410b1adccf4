"""The work that all frameworks do: digits, a perceptron of 49,960 parameters, one pass over 32 samples a peer.

Run inside another framework's environment: knows torch and scikit-learn only.
"""

import os

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

SAMPLES, BATCH, LEARNING_RATE = 32, 16, 0.3
NUM_PEERS, NUM_ROUNDS = (int(os.environ[name]) for name in ("NUM_PEERS", "NUM_ROUNDS"))


def make_model() -> nn.Sequential:
    """64, 666, 10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 666), nn.ReLU(), nn.Linear(666, 10))


def load_peer(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(32, 64) pixels in 0 to 1, and their digits (32,)."""
    bunch = load_digits()
    chosen = np.random.default_rng([1, number]).choice(len(bunch.target), SAMPLES, replace=False)
    inputs = torch.from_numpy((bunch.data[chosen] / 16).astype(np.float32))
    return inputs, torch.from_numpy(bunch.target[chosen].astype(np.int64))


def train(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """One pass of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for start in range(0, len(inputs), BATCH):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs[start : start + BATCH]), targets[start : start + BATCH])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
