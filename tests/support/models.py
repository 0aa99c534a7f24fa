"""A model of three kinds of parameters, in microseconds an update: for tests of who updates what, and when."""

import torch
from torch import nn


class Model(nn.Module):
    """An embedding, two projected matrices, a norm and a head, over a vocabulary of 16."""

    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        wide = 3 * width // 2
        self.mlp = nn.ModuleList([nn.Linear(width, wide, bias=False), nn.Linear(wide, width, bias=False)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 16, bias=False)

    def forward(self, ids):
        hidden = self.embedding(ids)
        return self.head(self.norm(hidden + self.mlp[1](torch.tanh(self.mlp[0](hidden)))))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy over a batch of `batches`."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).float(), targets)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of random inputs and targets, from the global generator."""
    return [(torch.randint(16, (32,)), torch.randint(16, (32,))) for _ in range(count)]
