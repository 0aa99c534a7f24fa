import pytest
import torch
from support.runs import shell

from qgalore.subspace.bases import align, exact_basis, iterate_basis, orthonormalize, randomized_basis, turn_towards

SHAPES = [(40, 64), (64, 40), (48, 48)]


def gradient(m: int, n: int, *, decay: float = 0.9, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A matrix with singular values decay**i."""
    U, V = (
        orthonormalize(torch.randn(m, m, dtype=torch.float64)),
        orthonormalize(torch.randn(n, n, dtype=torch.float64)),
    )
    k = min(m, n)
    return ((U[:, :k] * decay ** torch.arange(k)) @ V[:, :k].mT).to(dtype)


def energy(G: torch.Tensor, P: torch.Tensor) -> float:
    """The share of ||G||^2 that the basis captures, over the most that any basis of that rank can."""
    best = torch.linalg.svdvals(G.double())[: P.shape[1]].square().sum()
    return ((P.double().mT @ G.double()).square().sum() / best).item()


def orthonormality_error(P: torch.Tensor) -> float:
    return (P.mT @ P - torch.eye(P.shape[1], dtype=P.dtype)).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_exact_basis_is_the_svd(shape, rank):
    G = gradient(*shape)
    U = torch.linalg.svd(G).U[:, :rank]
    P = exact_basis(G, rank=rank)
    assert (P.mT @ U).abs().diagonal().min() > 1 - 1e-9, "column by column, up to the sign"
    assert P.gather(0, P.abs().argmax(0, keepdim=True)).min() > 0, "and the sign is fixed"


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_basis_of_a_float32_gradient_keeps_weak_directions(shape):
    """A Gram matrix in float32 would lose everything 1e-4 below the strongest direction."""
    G = gradient(*shape, decay=0.6, dtype=torch.float32)
    U = torch.linalg.svd(G.double()).U[:, 24:25].float()
    assert (exact_basis(G, rank=25)[:, 24:].mT @ U).abs() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_randomized_basis_captures_nearly_all(shape, rank):
    G = gradient(*shape, dtype=torch.float32)
    P = randomized_basis(G, rank=rank, seed=5)
    assert P.shape == (shape[0], rank)
    assert orthonormality_error(P) < 1e-5
    assert energy(G, P) > 0.999
    assert torch.equal(P, randomized_basis(G, rank=rank, seed=5))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_iteration_follows_a_turning_subspace(shape):
    """Each gradient differs from the last; one warm iteration each keeps within 1% of the best basis."""
    G, drift = gradient(*shape), gradient(*shape)
    P = randomized_basis(G, rank=8, seed=0)
    for step in range(1, 21):
        Gt = G + 0.02 * step * drift
        previous, P = P, iterate_basis(Gt, P)
        assert orthonormality_error(P) < 1e-12
        assert energy(Gt, P) > 0.99
        assert (P.mT @ previous).diagonal().min() > 0.8, "columns stay aligned with the old ones"


def test_a_converged_basis_stays_put():
    G = gradient(30, 50, decay=0.7)
    P = exact_basis(G, rank=6)
    assert (iterate_basis(G, P) - P).abs().max() < 1e-9


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e15])
def test_no_scale_of_the_gradient_breaks_it(scale):
    G = gradient(20, 30, dtype=torch.float32)
    P = iterate_basis(G * scale, randomized_basis(G * scale, rank=5, seed=0))
    assert orthonormality_error(P) < 1e-5
    assert energy(G, P) > 0.999


@pytest.mark.parametrize("G", [torch.zeros(12, 20), torch.ones(12, 20)], ids=["zero", "rank one"])
def test_degenerate_gradients_still_give_an_orthonormal_basis(G):
    P = randomized_basis(G, rank=6, seed=0)
    for basis in (P, iterate_basis(G, P), exact_basis(G, rank=6), exact_basis(G.mT, rank=6)):
        assert orthonormality_error(basis) < 1e-5


def test_align_rotates_inside_the_subspace_only():
    """Singular vectors with shuffled columns and signs come back to where they were."""
    P = orthonormalize(torch.randn(20, 5, dtype=torch.float64))
    assert torch.allclose(align((-P).flip(1), basis=P), P, atol=1e-12)
    Q = orthonormalize(torch.randn(20, 5, dtype=torch.float64))
    aligned = align(Q, basis=P)
    assert torch.allclose(aligned @ aligned.mT, Q @ Q.mT, atol=1e-12)
    assert (aligned - P).norm() < min((Q - P).norm(), (Q.flip(1) - P).norm())


def test_turning_goes_part_of_the_way():
    P = orthonormalize(torch.randn(20, 5, dtype=torch.float64))
    Q = align(orthonormalize(torch.randn(20, 5, dtype=torch.float64)), basis=P)
    assert torch.allclose(turn_towards(Q, basis=P, share=0.0), P, atol=1e-12)
    assert torch.allclose(turn_towards(Q, basis=P, share=1.0), Q, atol=1e-12)
    overlaps = [(turn_towards(Q, basis=P, share=share).mT @ Q).square().sum().item() for share in (0, 0.3, 0.6, 1)]
    assert overlaps == sorted(overlaps) and orthonormality_error(turn_towards(Q, basis=P, share=0.3)) < 1e-12


def test_the_benchmark_tells_good_bases_from_stale_ones():
    """One tiny shape: the exact ones are best, warm iteration next, and both ways of online PCA take the same step."""
    result = shell(["python", "benchmarks/subspace.py", "--shapes", "80x48", "--ranks", "8", "--repeats", "1"])
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| 48x80 | 8")]
    energy = {row[2]: float(row[-2]) for row in rows if len(row) == 7 and row[2] not in ("shorter", "longer")}
    assert energy["torch.linalg.svd"] == energy["Gram + eigh"] == 1
    assert 1 > energy["orthogonal iteration, warm"] > energy["the old basis"]
    apart = [float(row[-1]) for row in rows if row[2] in ("shorter", "longer")]
    assert len(apart) == 2 and max(apart) < 1e-4


def test_weak_directions_do_not_hang_on_the_last_bit():
    """Adam gives every coordinate the same size: another rotation of weak columns would be another update."""
    U, V = (torch.linalg.qr(torch.randn(96, 64, dtype=torch.float64)).Q for _ in range(2))
    G = ((U * 10 ** (-torch.arange(64) / 8)) @ V.mT).float()  # down to 1e-8 of the strongest
    other = G * (1 + 2**-23 * torch.randint(-1, 2, G.shape))  # last bits
    first, second = (randomized_basis(X, rank=32, seed=3) for X in (G, other))  # down to 1e-4
    assert (first.mT @ second).diagonal().abs().min() > 0.999, "up to the sign, which no update depends on"
