"""Norms and MLPs that keep little for the backward pass.

transformers' RMSNorm keeps its input in float32 and its normalised input, and its MLP keeps what SiLU made of the gate
and the input of the down-projection. All four are cheap to compute again, so here they are. In bfloat16 that saves
8 x hidden + 4 x intermediate bytes for each token and layer. The forward pass is transformers' to the last bit. The
gradients are written out, in fewer steps than automatic ones take and, in bfloat16, with fewer roundings. Those of the
MLP are written over what it kept, so backward runs once.

Compiled layers are left alone: their compiler decides what is kept. So are MLPs with hooks, and layers under autocast.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from peft_pretraining.model.family import family_of
from qgalore.factored import Linear, takes_product, weight_gradient
from qgalore.storage.chunks import row_chunks
from qgalore.storage.quantized_weight import values_of


def keep_little(model: PreTrainedModel) -> None:
    """Replaces the norms of a model, and the MLPs that have SiLU, by those of this file; parameters stay the same."""
    family, has_silu = family_of(model.config), model.config.hidden_act in ("silu", "swish")
    for module in model.modules():
        theirs = type(module)
        if theirs.__name__.endswith(family.norm):
            module.__class__ = _combined(_Norm, theirs)  # type: ignore[arg-type]  # classes have hashes
        elif theirs.__name__.endswith(family.mlp) and has_silu:
            module.__class__ = _combined(_Mlp, theirs)  # type: ignore[arg-type]
        elif theirs is nn.Linear:
            module.__class__ = _combined(_Linear, theirs)


@cache
def _combined(ours: type, theirs: type) -> type:
    """A class with our forward, and everything else as it was."""
    return theirs if issubclass(theirs, ours) else type(theirs.__name__, (ours, theirs), {"__module__": __name__})


class _Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _ours():
            return super().forward(hidden_states)
        return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _Mlp(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj
        if not _ours() or any(map(_is_watched, (self.gate_proj, self.up_proj, down))):
            return super().forward(x)
        if torch.is_grad_enabled() and isinstance(down, _Linear) and down.is_plain():
            return swiglu_linear(self.gate_proj(x), self.up_proj(x), down.weight)
        return down(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if _ours() and type(self.weight) is nn.Parameter and takes_product(self.weight):
            return Linear.apply(x, self.weight, self.bias)
        return super().forward(x)

    def is_plain(self) -> bool:
        """Whether a call that nobody watches is x W^T and nothing else: without a bias and INT8 products."""
        return self.bias is None and getattr(self.weight, "products", None) is None


def _ours() -> bool:
    """Whether a forward pass goes our way: not compiled, and in the dtype of the weights."""
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"))


_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody else may see what goes through a module, and keep it: by hooks, or by a forward of their own."""
    everywhere = vars(nn.modules.module)
    watching = any(getattr(module, f"_{name}") or everywhere.get(f"_global_{name}") for name in _HOOKS)
    return watching or "forward" in vars(module)


class RMSNorm(torch.autograd.Function):
    """w * n with n = x / rms(x), computed in float32. x: (..., n), w: (n). Keeps x, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # 1 / rms
        ctx.save_for_backward(x, w, scale)
        return w * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dn = w dy, dx = (dn - n mean(n dn)) / rms, dw = the sum of n dy over the rows."""
        x, w, scale = ctx.saved_tensors
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        n, dx, dw = x.to(torch.float32) * scale, None, None
        if needs_dw:
            dw = (dy * n.to(x.dtype)).flatten(0, -2).sum(0)
        if needs_dx:
            dn = (dy * w).to(torch.float32)
            along = torch.linalg.vecdot(dn, n).unsqueeze(-1).div_(n.shape[-1])
            dx = dn.addcmul_(n, along, value=-1).mul_(scale).to(x.dtype)
        return dx, dw, None


class SwiGLU(torch.autograd.Function):
    """SiLU(gate) * up, of which gate and up are kept. All have one shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _swiglu_gradients(gate, up, dh)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """h W^T with h = SiLU(gate) * up, of which gate and up are kept. gate, up: (..., n), W: (m, n) -> (..., m)

    They are kept before the product is made. Where a layer is run again for its activations, torch ends that with the
    last tensor that is kept, and a Function's are when it returns: so it does not make this product again.
    """
    kept = _Kept.apply(gate, up, weight)
    return _Product.apply(kept, gate.detach(), up.detach(), weight.detach())


class _Kept(torch.autograd.Function):
    """Has the gradients of `swiglu_linear`. Returns zeros of its result's shape, in no memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.factored = takes_product(weight)
        return gate.new_zeros(()).expand(*gate.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        dh = dy @ values_of(weight, dy.dtype)
        d_gate, d_up = _swiglu_gradients(gate, up, dh, h_over_dh=True)
        if not ctx.needs_input_grad[2]:
            return d_gate, d_up, None
        return d_gate, d_up, weight_gradient(dy.flatten(0, -2), dh.flatten(0, -2), factored=ctx.factored)


class _Product(torch.autograd.Function):
    """The result of `swiglu_linear`, whose gradient goes to what was kept for it."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.silu(gate).mul_(up), values_of(weight, gate.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return dy, None, None, None


def _swiglu_gradients(gate: Tensor, up: Tensor, dh: Tensor, *, h_over_dh: bool = False) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of h, in their memory. All have one shape.

    h_over_dh: whether h is written over dh, which is contiguous.
    """
    gate, up = gate.contiguous(), up.contiguous()
    g, u, d = (tensor.flatten(0, -2) for tensor in (gate, up, dh))
    for rows in row_chunks(*g.shape, device=g.device):
        activated = F.silu(g[rows])
        d_up, d_activated = activated * d[rows], d[rows] * u[rows]
        if h_over_dh:
            torch.mul(activated, u[rows], out=d[rows])
        u[rows], g[rows] = d_up, torch.ops.aten.silu_backward(d_activated, g[rows])
    return gate, up
