"""Every form of a matrix means the plain one, whatever the rows and the strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pagedserve.device import pick
from pagedserve.kernels import cpu_matrix
from pagedserve.kernels.matrix import Matrix, PlainMatrix

FORMS = {
    "plain": PlainMatrix,
    "packed": cpu_matrix.PackedMatrix.of,
    "sliced": cpu_matrix.SlicedMatrix.of,
}


@pytest.mark.parametrize("rows", (1, 2, 3, 16, 130))
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_torch(form: str, rows: int) -> None:
    weight, bias = torch.randn(96, 40), torch.randn(96)
    x, residual = torch.randn(rows, 40), torch.randn(rows, 96)
    matrix: Matrix = FORMS[form](weight)
    kept = residual.clone()
    for b in (None, bias):
        torch.testing.assert_close(matrix.apply(x, b), F.linear(x, weight, b))
        torch.testing.assert_close(matrix.add(x, b, residual), F.linear(x, weight, b) + residual)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_longer_tensor_are_taken(form: str) -> None:
    weight, wide = torch.randn(64, 24), torch.randn(7, 60)
    matrix: Matrix = FORMS[form](weight)
    for rows in (1, 2, 5):
        x = wide[:rows, 12:36]
        torch.testing.assert_close(matrix.apply(x, None), F.linear(x, weight))


def test_a_single_row_comes_with_the_strides_of_a_fresh_tensor() -> None:
    matrix = cpu_matrix.SlicedMatrix.of(torch.randn(64, 24))
    assert matrix.apply(torch.randn(1, 24), None).stride() == (64, 1)
    assert matrix.apply(torch.randn(2, 24), None).stride() == (64, 1)


def test_only_small_matrices_are_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 24)
    assert isinstance(cpu_matrix.pack(weight), cpu_matrix.SlicedMatrix)
    assert isinstance(cpu_matrix.pack(torch.randn(65, 24)), cpu_matrix.PackedMatrix)
    monkeypatch.setattr(cpu_matrix, "MAX_SLICED_BYTES", weight.nbytes - 1)
    assert isinstance(cpu_matrix.pack(weight), cpu_matrix.PackedMatrix)


def test_sixteen_bits_stay_plain() -> None:
    matrix = pick("cpu").matrix(torch.randn(64, 24, dtype=torch.bfloat16))
    assert isinstance(matrix, PlainMatrix)
