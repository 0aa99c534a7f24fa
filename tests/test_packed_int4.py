import pytest
import torch
from qgalore.storage.packed_basis import PackedBasis, pack_basis, unpack_basis


def orthonormal(m: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(m, r))[0]


def stored_bytes(packed: PackedBasis) -> int:
    return sum(part.numel() * part.element_size() for part in packed)


@pytest.mark.parametrize("bits, levels", [(4, 15), (8, 255)])
@pytest.mark.parametrize("shape", [(512, 64), (33, 7), (1, 1), (3, 5), (40, 512)])
def test_every_element_comes_back_within_half_a_step(shape, bits, levels):
    P = torch.randn(shape)
    packed = pack_basis(P, bits=bits)
    back = unpack_basis(packed, shape=shape)
    groups = P.unflatten(1, (packed.scale.shape[1], -1)).double()
    widest = (groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)) / (levels - 1)
    assert (packed.scale <= widest * (1 + 1e-6)).all(), "the step is no wider than it must be"
    error = (back - P).abs().unflatten(1, (packed.scale.shape[1], -1)).amax(-1)
    assert (error <= packed.scale * (0.5 + 1e-4)).all()


def test_two_codes_share_a_byte():
    packed = pack_basis(orthonormal(512, 256))
    assert packed.codes.shape == (512 * 128,)
    assert stored_bytes(packed) == 512 * 128 + 512 * 5
    assert pack_basis(torch.randn(3, 5)).codes.shape == (8,), "15 codes: the last byte is half empty"
    assert stored_bytes(pack_basis(orthonormal(512, 256), bits=8)) == 512 * 256 + 512 * 5


@pytest.mark.parametrize("bits, error, overlap", [(4, 0.105, 0.990), (8, 0.0065, 0.9999)])
def test_a_basis_keeps_its_span(bits, error, overlap):
    """The figures in the module's docstring, with 1% to spare."""
    P = orthonormal(1376, 128)
    back = unpack_basis(pack_basis(P, bits=bits), shape=(1376, 128))
    assert (back - P).norm() / P.norm() < error
    assert (torch.linalg.qr(back)[0].mT @ P).square().sum() / 128 > overlap
    assert torch.linalg.matrix_norm(back.mT @ back - torch.eye(128), 2) < 2.2 * error


def test_rows_do_not_disturb_each_other():
    """A large row would coarsen its neighbours' grid, were the groups taken from the flattened basis."""
    P = torch.randn(64, 32)
    P[7] *= 1000
    back = unpack_basis(pack_basis(P), shape=(64, 32))
    error = (back - P).norm(dim=1) / P.norm(dim=1)
    assert error.max() < 0.15


def test_parts_are_plain_tensors_that_save_and_load(tmp_path):
    P = orthonormal(96, 24)
    packed = pack_basis(P)
    torch.save(packed._asdict(), tmp_path / "basis.pt")
    loaded = PackedBasis(**torch.load(tmp_path / "basis.pt", weights_only=True))
    assert torch.equal(unpack_basis(loaded, shape=(96, 24)), unpack_basis(packed, shape=(96, 24)))
    half = unpack_basis(packed, shape=(96, 24), dtype=torch.bfloat16)
    assert torch.equal(half, unpack_basis(packed, shape=(96, 24)).bfloat16()), "rounded once, at the end"


def test_nan_stays_nan():
    P = orthonormal(16, 8)
    P[3, 4] = float("nan")
    back = unpack_basis(pack_basis(P), shape=(16, 8))
    assert not back[3].isfinite().any()
    assert back[[0, 1, 2, 4]].isfinite().all()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        pack_basis(torch.randn(4, 4), bits=3)
