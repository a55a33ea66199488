"""Products against float64 ones, on both sides of the size from which another library computes them."""

import pytest
import torch

from ase_dist.ops import products

pytestmark = pytest.mark.single_gpu

SMALL, LARGE = (5, 12, 7), (700, 96, 130)  # T, D, O


def operands(sizes, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    T, D, O = sizes
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((T, D), (O, D), (O,), (T, O))]


def close_to_exact(got, want):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_exact_to_rounding(sizes, dtype):
    x, weight, bias, y = operands(sizes, dtype=dtype)
    X, W, B, Y = (tensor.double().clone() for tensor in (x, weight, bias, y))
    close_to_exact(products.linear(x, weight), X @ W.T)
    close_to_exact(products.linear(x, weight, bias), X @ W.T + B)
    close_to_exact(products.linear(y, weight.T), Y @ W)
    close_to_exact(products.outer(y, x), Y.T @ X)
    close_to_exact(products.add_linear(y, x, weight), Y + X @ W.T)


@pytest.mark.parametrize("chunk_values", [1, 1024, 2**40])
def test_a_product_is_added_in_place_in_bands_of_any_size(chunk_values, monkeypatch):
    monkeypatch.setattr(products, "CHUNK_VALUES", (chunk_values, chunk_values))
    monkeypatch.setattr(products, "MIN_ONEDNN_FLOPS", 0)
    x, weight, _, y = operands((9, 12, 7))
    want = y + x @ weight.T
    assert products.add_linear(y, x, weight) is y
    close_to_exact(y, want)


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize("chunk_values", [1, 25, 2**40])
def test_bands_are_all_rows_once_and_in_order(rows, chunk_values, monkeypatch):
    monkeypatch.setattr(products, "CHUNK_VALUES", (chunk_values, chunk_values))
    like = torch.empty(rows, 5)
    slices = products.row_chunks(like)
    assert torch.equal(torch.cat([torch.arange(rows)[each] for each in slices]), torch.arange(rows))
    longest = max(each.stop - each.start for each in slices)
    assert longest <= 1 or longest * 5 <= chunk_values
    assert products.row_chunks(torch.empty(rows, 5, device="meta")) == [slice(0, rows)]


def test_bands_are_a_quarter_of_the_rows_within_their_bounds(monkeypatch):
    monkeypatch.setattr(products, "CHUNK_VALUES", (20, 40))  # 4 and 8 rows of 5 numbers
    counts = {rows: len(products.row_chunks(torch.empty(rows, 5))) for rows in (3, 8, 16, 24, 32, 64)}
    assert counts == {3: 1, 8: 2, 16: 4, 24: 4, 32: 4, 64: 8}
    narrow = {rows: len(products.row_chunks(torch.empty(rows, 5, dtype=torch.bfloat16))) for rows in counts}
    assert narrow == counts  # half the bytes would be one chunk where float32 has two


@pytest.mark.filterwarnings("ignore:TF32")
def test_large_products_go_to_onednn_unless_it_is_switched_off(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    x, weight, *_ = operands(LARGE)
    assert products._by_onednn(x, weight)
    assert not products._by_onednn(*operands(SMALL)[:2])
    assert not products._by_onednn(x.double(), weight.double())
    assert not products._by_onednn(x.to("meta"), weight.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products._by_onednn(x, weight)
