"""The dtype of weights and activations: what the user names, or the fastest that the device has natively."""

import torch

from peft_pretraining.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32, "float32": torch.float32}


def native_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Emulation is slower than float32 and does not count."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # not is_bf16_supported(): it counts emulation
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch 2.11
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def known_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises UserError for an unknown one."""
    if name not in DTYPES:
        raise UserError(f"unknown --dtype {name!r}. Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def resolve_dtype(name: str | None, device: torch.device | str) -> torch.dtype:
    """The dtype of weights and activations: what --dtype names, by default the fastest that `device` has natively.

    Raises UserError for an unknown name, and for bfloat16 where the device would only emulate it.
    """
    native = native_bfloat16(device)
    if name is None:
        return torch.bfloat16 if native else torch.float32
    dtype = known_dtype(name)
    if dtype == torch.bfloat16 and not native:
        raise UserError(
            f"--dtype {name}: this {torch.device(device).type} has no bfloat16 arithmetic. Use --dtype float32."
        )
    return dtype
