"""Sparse codes against the dense matrices that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.codes import Pattern, SparseCodes

quickly = settings(max_examples=60, deadline=None)


@st.composite
def matrices(draw: st.DrawFn, max_rows: int = 7, max_features: int = 9) -> Tensor:
    """Small float64 matrices, mostly zeros, with empty rows and columns, and negative values."""
    n, d_sae = draw(st.integers(0, max_rows)), draw(st.integers(1, max_features))
    value = st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.5, 3.25])
    return torch.tensor(
        draw(st.lists(value, min_size=n * d_sae, max_size=n * d_sae)), dtype=torch.float64
    ).view(n, d_sae)


@st.composite
def fixed_codes(draw: st.DrawFn) -> SparseCodes:
    """Codes with exactly k entries in every row, none of them 0, features in any order."""
    n, d_sae, seed = draw(st.integers(1, 6)), draw(st.integers(2, 9)), draw(st.integers(0, 10_000))
    k = draw(st.integers(1, d_sae))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(n)]).int()
    return SparseCodes(
        Pattern(d_sae, indices), torch.rand(n, k, generator=generator, dtype=torch.float64) + 0.5
    )


any_codes = st.one_of(fixed_codes(), matrices().map(SparseCodes.from_dense))


@quickly
@given(matrices())
def test_dense_there_and_back(dense: Tensor) -> None:
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense)
    assert (codes.n_rows, codes.d_sae) == dense.shape
    assert codes.nnz == int((dense != 0).sum())
    assert codes.indices.dtype == torch.int32
    assert codes.l0() == pytest.approx(codes.nnz / max(len(dense), 1))


@quickly
@given(any_codes)
def test_entries_are_row_major_and_never_zero(codes: SparseCodes) -> None:
    dense = codes.to_dense()
    rows, features, values = codes.entries()
    assert (rows.dtype, features.dtype) == (torch.int64, torch.int64)
    assert bool((rows.diff() >= 0).all())
    assert bool((values != 0).all())
    assert len(values) == int((dense != 0).sum())
    assert torch.equal(dense[rows, features], values)


@quickly
@given(any_codes, st.data())
def test_row_slices(codes: SparseCodes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, codes.n_rows))
    stop = data.draw(st.integers(start, codes.n_rows))
    assert torch.equal(codes.row_slice(start, stop).to_dense(), codes.to_dense()[start:stop])
    pattern, span = codes.pattern.slice(start, stop)
    assert pattern.n_rows == stop - start
    assert len(codes.values[span]) == len(pattern.indices)


@quickly
@given(any_codes)
def test_columns(codes: SparseCodes) -> None:
    dense = codes.to_dense()
    for feature in range(codes.d_sae):
        assert torch.equal(codes.column(feature), dense[:, feature])


@quickly
@given(st.lists(any_codes, min_size=1, max_size=4))
def test_concatenation(parts: list[SparseCodes]) -> None:
    d_sae = max(part.d_sae for part in parts)
    wide = [SparseCodes(Pattern(d_sae, p.indices, p.pattern.row_offsets), p.values) for p in parts]
    whole = SparseCodes.concatenate(wide)
    assert torch.equal(whole.to_dense(), torch.cat([part.to_dense() for part in wide]))
    same_k = all(
        p.pattern.row_offsets is None and p.indices.shape[1] == wide[0].indices.shape[1] for p in wide
    )
    assert (whole.pattern.row_offsets is None) == same_k


@quickly
@given(fixed_codes(), st.data())
def test_topk_with_too_few_positives_becomes_ragged(codes: SparseCodes, data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=codes.nnz, max_size=codes.nnz))
    values = torch.where(torch.tensor(flags).view_as(codes.values), codes.values, 0.0)
    found = SparseCodes.from_topk(codes.indices, values, codes.d_sae)
    assert torch.equal(found.to_dense(), SparseCodes(codes.pattern, values).to_dense())
    assert (found.pattern.row_offsets is None) == all(flags)
    assert bool((found.values != 0).all())


@quickly
@given(any_codes, st.integers(1, 3))
def test_transposed_sums_equal_the_dense_product(codes: SparseCodes, d: int) -> None:
    dense = codes.to_dense()
    table = torch.randn(codes.n_rows, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    transposed = codes.pattern.transposed
    sums = transposed.weighted_sums(table, codes.values)
    assert sums.shape == (codes.d_sae, d)
    torch.testing.assert_close(sums, dense.T @ table, rtol=1e-12, atol=1e-12)
    assert torch.equal(transposed.counts, (dense != 0).sum(0))
    assert torch.equal(codes.entries()[0][transposed.order], transposed.rows)
    for start, count in zip(transposed.offsets.tolist(), transposed.counts.tolist(), strict=True):
        assert bool((transposed.rows[start : start + count].diff() > 0).all())


def test_the_transposed_structure_is_built_once() -> None:
    pattern = Pattern(4, torch.tensor([[0, 2], [2, 3]], dtype=torch.int32))
    assert pattern.transposed is pattern.transposed
