"""A LLaMA of one layer in training, whose whole state can be compared to the last bit."""

import copy

import torch
from transformers import LlamaConfig

from peft_pretraining.checkpoint.files import Checkpoint
from peft_pretraining.checkpoint.snapshot import restore_model, restore_optimizer, take_snapshot
from peft_pretraining.model.build import build_model
from qgalore.factory import OPTIMIZERS, Settings, create_optimizer, create_updates
from qgalore.param_groups import split_parameters
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import open_weight
from qgalore.sync import GradSync

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)
TOKENS = torch.arange(64 * 8).view(64, 8) * 7919 % 61


class Training:
    """A small LLaMA with its optimizer. Moments, bases and weights are large enough to be kept in few bits."""

    def __init__(
        self, optimizer="galore_adamw", *, dtype=torch.float32, int8=False, seed=0, tied=False, device="cpu", **settings
    ):
        config = copy.deepcopy(CONFIG)
        config.tie_word_embeddings = tied
        self.model = build_model(config, device=device, dtype=dtype, seed=seed)
        if int8:
            simulation = int8 == "simulated"
            quantize_linear_layers(self.model, select=lambda n: "layers" in n, group_size=16, simulation=simulation)
        lazy = dict(proj_bits=4, cos_threshold=0.4, queue_size=2) if OPTIMIZERS[optimizer].lazy_threshold else {}
        chosen = Settings(**dict(lr=0.01, beta1=0.9, rank=32, update_proj_gap=3) | lazy | settings)
        self.optimizer = create_optimizer(optimizer, groups=split_parameters(self.model), settings=chosen)
        self.updates = create_updates(optimizer, optimizer=self.optimizer, sync=GradSync())
        self.done = 0

    def train(self, updates: int) -> "Training":
        """So many more updates, each on the next four sequences."""
        for _ in range(updates):
            ids = TOKENS[self.done * 4 : self.done * 4 + 4].to(self.model.device)
            logits = self.model(ids).logits.float()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            self.updates.finish()
            self.done += 1
        return self

    def snapshot(self, **progress):
        """What a checkpoint is written from; progress: what it says beside tensors."""
        return take_snapshot(self.model, self.optimizer, update=self.done, progress=progress)

    def restore(self, folder) -> "Training":
        """Goes on from a checkpoint with `done` in its progress."""
        checkpoint = Checkpoint.open(folder)
        restore_model(self.model, checkpoint)
        names = {p: name for name, p in self.model.named_parameters()}
        restore_optimizer(self.optimizer, checkpoint, names=names)
        self.done = checkpoint.state["done"]
        return self

    def everything(self) -> dict[str, object]:
        """All weights and states, tensors as bytes and kind."""
        held = {}
        for name, p in self.model.named_parameters():
            held |= {f"{name}.{part}": t for part, t in open_weight(p).tensors().items()}
        names = {p: name for name, p in self.model.named_parameters()}
        states = self.optimizer.state
        held |= {f"{names[p]}:{key}": value for p, state in states.items() for key, value in state.items()}
        return {key: exactly(value) for key, value in held.items()}


def exactly(value: object) -> object:
    """A tensor as its bytes, dtype, place and layout; anything else as it is."""
    if not torch.is_tensor(value):
        return value
    data = value.detach().reshape(-1).view(torch.uint8).tolist()
    return value.dtype, value.device, value.shape, value.stride(), data
