"""FSDP2 around a model: each decoder layer, the embedding, and the rest, spread over the ranks by rows.

The loss reads the head's weight itself (loss.py), so FSDP2's root is a module whose forward is the loss of a batch.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from peft_pretraining.errors import UserError
from peft_pretraining.model.family import family_of
from peft_pretraining.model.loss import SHARDED, loss_of_whole
from qgalore.factory import Recipe, Settings
from qgalore.param_groups import split_parameters
from qgalore.storage.blockwise import BLOCK, MIN_ELEMENTS, row_multiple


class TokenLoss(nn.Module):
    """token_loss_sum as the forward pass of a module."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        return loss_of_whole(self.model, input_ids, targets, positions)


class Sharding:
    """Spreads a model over the ranks while it is built, so that no rank ever holds more than one layer of it whole."""

    def __init__(self, device: torch.device, *, ranks: int, replicas: int = 1) -> None:
        """
        ranks: processes that share the rows; they follow each other.
        replicas: groups of such processes, each with the whole model.
        """
        shape, names = ((ranks,), ("rows",)) if replicas == 1 else ((replicas, ranks), ("replicas", "rows"))
        self.mesh: DeviceMesh = init_device_mesh(device.type, shape, mesh_dim_names=names)

    def shard_rest(self, model: PreTrainedModel) -> None:
        """Spreads what is left of a model, and has `token_loss_sum` go through FSDP2 from now on."""
        family = family_of(model.config)
        if not model.config.tie_word_embeddings:  # FSDP2 wants both uses of a weight in one group
            self.shard(family.part("embedding", model))
        root = TokenLoss(model)
        self.shard(root)
        vars(model)[SHARDED] = root  # not as a submodule, which would make a ring

    def shard(self, module: nn.Module) -> None:
        """Spreads the weights of a module that are not spread yet, such as a decoder layer's when all of them exist."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=self.mesh)
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # the loss is divided by the targets of all
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows no other


def check_rows(model: PreTrainedModel, *, ranks: int, settings: Settings, recipe: Recipe, quantized: bool) -> None:
    """Raises UserError for parameters whose rows the ranks cannot share out.

    model: the model, which may be on the meta device.
    quantized: whether the weights of matrices are.
    """
    for group in split_parameters(model):
        matrix = group.kind == "matrix"
        bits, kept = recipe.bits_of(group, settings), settings.rank if matrix and recipe.projected else None
        for name, p in zip(group.names, group.parameters, strict=True):
            rows = -(-p.shape[0] // ranks)  # of a process
            if matrix and quantized and p.shape[0] % ranks:
                raise UserError(
                    f"--parallel fsdp with --weight_quant: the {p.shape[0]} rows of {name} cannot be shared out to "
                    f"{ranks} processes evenly. Take another number of processes, or leave out --weight_quant."
                )
            width = min(p.shape[1], kept or p.shape[1]) if p.ndim == 2 else 1
            if bits != 32 and p.shape[0] * width >= MIN_ELEMENTS and rows % row_multiple(width):
                raise UserError(
                    f"--parallel fsdp with {bits}-bit moments: a process would have {rows} rows of {name}, times "
                    f"{width} numbers, which is no multiple of {BLOCK}, the block of such moments. Take another "
                    "--rank or number of processes" + ("." if matrix else ", or --embedding_state_bits 32.")
                )


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether the rows of the model are spread over processes."""
    return SHARDED in vars(model)


def reshard(model: PreTrainedModel) -> None:
    """Frees what FSDP2 keeps gathered after a forward pass without a backward pass; it would miss the next update."""
    if (root := vars(model).get(SHARDED)) is not None:
        for module in root.modules():
            if hasattr(module, "reshard"):
                module.reshard()
