"""The polar factor over the whole range of singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qriemann.ops import POLAR_RTOL, polar
from tests.ops import specification

# A matrix counts as settled when ||O - O O^T O||_F < 1e-5; for a singular value v that is v |1 - v^2| < 1e-5: near one
# |1 - v| < 5e-6, near zero v < 1e-5.
SETTLED = 1e-5
# Between this fraction of the cut-off and the cut-off a singular value ends at one or at zero: the polynomial takes some of
# them up to one before it is known that they lie below.
UNDECIDED_FROM = 0.5
SIZES = (2, 6, 16, 32, 66, 128, 256)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def with_spectrum(sigma: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """L diag(sigma) R^T with L and R."""
    generator = torch.Generator().manual_seed(seed)
    left, right = orthogonal(len(sigma), generator), orthogonal(len(sigma), generator)
    return (left * sigma) @ right.mT, left, right


def spectrum(size: int, value: float, share: str) -> Tensor:
    """Ones, with `value` once, for half of them, or for all but one."""
    count = {"one": 1, "half": size // 2, "all but one": size - 1}[share]
    return torch.cat([torch.ones(size - count), torch.full((count,), value)]).double()


@pytest.mark.parametrize("share", ["one", "half", "all but one"])
@pytest.mark.parametrize("size", SIZES)
def test_singular_values_above_the_cut_off_become_one_and_those_below_zero(size, share):
    above = [1.05 * POLAR_RTOL, 2e-3, 1e-2, 0.1, 0.5, 1.0]
    below = [UNDECIDED_FROM * POLAR_RTOL, 1e-4, 1e-6, 1e-8, 1e-10, 0.0]
    spectra = [spectrum(size, value, share) for value in above + below]
    cases = [with_spectrum(sigma) for sigma in spectra]
    for o, sigma, (_, left, right) in zip(polar(torch.stack([k for k, _, _ in cases])), spectra, cases, strict=True):
        kept = (sigma > POLAR_RTOL).double()
        torch.testing.assert_close(torch.linalg.svdvals(o), kept.sort(descending=True)[0], rtol=0, atol=SETTLED)
        torch.testing.assert_close(o, (left * kept) @ right.mT, rtol=0, atol=SETTLED)


@pytest.mark.parametrize("size", SIZES)
def test_singular_values_near_the_cut_off_become_one_or_zero(size):
    for value in torch.linspace(UNDECIDED_FROM, 1.05, 12).tolist():
        k, _, _ = with_spectrum(spectrum(size, value * POLAR_RTOL, "one"))
        sigma = torch.linalg.svdvals(polar(k[None])[0])
        assert torch.minimum(sigma, (sigma - 1).abs()).max() < SETTLED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e37])
def test_the_scale_of_the_matrix_does_not_matter(scale, dtype):
    k, left, right = with_spectrum(torch.linspace(1, 0.1, 8, dtype=torch.float64))
    o = polar((scale * k)[None].to(dtype))[0]
    torch.testing.assert_close(o.double(), left @ right.mT, rtol=0, atol=SETTLED)


def test_a_matrix_in_a_batch_is_computed_as_alone():
    matrices = torch.stack([with_spectrum(spectrum(16, value, "half"))[0] for value in (1.0, 1e-2, 1e-4, 0.0)])
    together = polar(matrices)
    for k, o in zip(matrices, together, strict=True):
        # A batch of one may take another kernel, hence float32 rounding and not the same bits.
        torch.testing.assert_close(polar(k[None])[0], o, rtol=0, atol=SETTLED)
        torch.testing.assert_close(o, specification.polar(k), rtol=0, atol=SETTLED)


@pytest.mark.parametrize("entry", [0.0, 7e-42])
def test_zero_and_a_matrix_of_subnormals_are_zero(entry):
    # 7e-42 is left of a momentum after a thousand steps without gradient: 0.9 times the least float32 rounds back to it.
    assert not polar(torch.full((3, 8, 8), entry)).any()
