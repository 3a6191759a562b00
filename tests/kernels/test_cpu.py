"""The C++ kernels mean what `reference` says, in any shape, and nothing breaks without them."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pagedserve.kernels import cpu, extension, reference

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def kernels() -> cpu.Kernels:
    try:
        extension.find_compiler(extension.CPU)
    except extension.Unavailable as reason:
        pytest.skip(str(reason))
    found = cpu.load()
    if found is None:
        pytest.skip("PAGEDSERVE_CPU_KERNELS is off")
    return found


@pytest.fixture
def two_threads(kernels: cpu.Kernels) -> Iterator[None]:
    before, kernels.threads = kernels.threads, 2
    yield
    kernels.threads = before


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape and got.dtype == torch.float32
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= TOLERANCE, error


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    wanted = x.double() @ weight.double().t()
    return wanted if bias is None else wanted + bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "columns"), [(1, 1), (7, 5), (33, 17), (64, 256), (131, 99)])
def test_a_product_of_any_shape_is_that_of_torch(
    kernels: cpu.Kernels, size: int, columns: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(size, columns).to(dtype).float()
    matrix = kernels.matrix(weight)
    bias = torch.randn(size)
    for count in range(71):
        x = torch.randn(count, columns + 3)[:, 1 : columns + 1]
        residual = torch.randn(count, size + 2)[:, :size]
        if not count:
            assert matrix.apply(x, bias).shape == (0, size)
            continue
        assert_close(matrix.apply(x, None), product(x, weight))
        assert_close(matrix.apply(x, bias), product(x, weight, bias))
        assert_close(matrix.add(x, None, residual), product(x, weight) + residual)
        assert_close(matrix.add(x, bias, residual), product(x, weight, bias) + residual)


def test_a_matrix_is_halved_only_where_bfloat16_is_exact(kernels: cpu.Kernels) -> None:
    weight = torch.randn(32, 64)
    exact = kernels.matrix(weight.bfloat16().float())
    assert [tensor.nbytes for tensor in kernels.matrix(weight).tensors()] == [32 * 64 * 4]
    assert [tensor.nbytes for tensor in exact.tensors()] == [32 * 64 * 2]


def test_several_threads_compute_what_one_does(kernels: cpu.Kernels, two_threads: None) -> None:
    matrix, x = kernels.matrix(torch.randn(700, 300)), torch.randn(200, 300)
    for _ in range(20):
        several = matrix.apply(x, None)
        kernels.threads = 1
        assert torch.equal(several, matrix.apply(x, None))
        kernels.threads = 2


@pytest.mark.parametrize("size", [1, 15, 16, 63, 64, 100, 257])
def test_rms_norm(kernels: cpu.Kernels, size: int) -> None:
    x, weight = torch.randn(5, size), torch.randn(size)
    wanted = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(kernels.rms_norm(x, weight, 1e-5), wanted)


@pytest.mark.parametrize("size", [1, 15, 16, 63, 704])
def test_activations(kernels: cpu.Kernels, size: int) -> None:
    x = torch.randn(3, 2 * size) * 8
    assert_close(kernels.silu_and_mul(x), reference.silu_and_mul(x.double()))
    assert_close(kernels.gelu_tanh_and_mul(x), reference.gelu_tanh_and_mul(x.double()))
    assert_close(kernels.gelu_tanh(x), reference.gelu_tanh(x.double()))


def test_activations_of_what_is_far_out_and_of_nan(kernels: cpu.Kernels) -> None:
    x = torch.tensor([-1e20, -200.0, -90.0, -20.0, 0.0, 20.0, 200.0, 1e20, torch.nan])
    gated = torch.cat((x, torch.ones(9)))[None]
    results = (
        (kernels.silu_and_mul(gated)[0], torch.nn.functional.silu(x)),
        (kernels.gelu_tanh_and_mul(gated)[0], reference.gelu_tanh(x)),
        (kernels.gelu_tanh(x), reference.gelu_tanh(x)),
    )
    for got, wanted in results:
        torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-6, atol=1e-30, equal_nan=True)
        assert abs(got[0]) < 1e-15


@pytest.mark.parametrize(("heads", "size", "rotated"), [(1, 2, 2), (5, 24, 24), (6, 64, 16)])
def test_rotary(kernels: cpu.Kernels, heads: int, size: int, rotated: int) -> None:
    x = torch.randn(7, heads + 2, size)[:, :heads]
    cos, sin = torch.randn(2, 7, 1, rotated)
    got = kernels.rotary(x, cos, sin)
    assert got.is_contiguous()
    assert_close(got, reference.rotary(x.double(), cos.double(), sin.double()))


class Cache:
    """A cache of NaN with shuffled blocks, another layer between, and rows written into it."""

    def __init__(
        self, kernels: cpu.Kernels, block_size: int, kv_heads: int, size: int, parts: int = 2
    ):
        self.kernels, self.block_size, self.parts = kernels, block_size, parts
        self.heads, self.size = kv_heads, size

    def rows(self, lens: list[int]) -> None:
        width = -(-max(lens) // self.block_size)
        blocks = torch.randperm(len(lens) * width + 3)
        self.tables = blocks[: len(lens) * width].view(len(lens), width)
        shape = (len(blocks), 2, self.parts, self.block_size, self.heads, self.size)
        cache = torch.full(shape, torch.nan)
        self.kv = cache[:, 1]
        wanted = self.kv.clone()
        for table, length in zip(self.tables, lens, strict=True):
            position = torch.arange(length)
            slots = table[position // self.block_size] * self.block_size
            slots += position % self.block_size
            k, v = torch.randn(2, length, self.heads + 1, self.size)[:, :, 1:]
            values = v if self.parts == 2 else None
            self.kernels.kv_write(self.kv, slots, k, values)
            reference.kv_write(wanted, slots, k, values)
        assert torch.equal(self.kv.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert cache[:, 0].isnan().all()

    def paged(self, lens: list[int], counts: list[int]) -> cpu.PagedRows:
        starts = torch.tensor([0, *counts]).cumsum(0)
        return cpu.PagedRows(self.tables, torch.tensor(lens), starts)

    def check(self, heads: int, lens: list[int], counts: list[int], **features: Any) -> None:
        """Attention of fresh rows is what `reference` says."""
        self.rows(lens)
        q = torch.randn(sum(counts), heads + self.heads, self.size)[:, :heads]
        rows = self.paged(lens, counts)
        got = self.kernels.paged_attention(q, self.kv, rows, scale=0.3, **features)
        wanted = reference.paged_attention(
            q, self.kv, self.tables, lens, counts, scale=0.3, **features
        )
        assert_close(got, wanted)


def features(heads: int, *names: str) -> dict[str, Any]:
    """Of the parts of attention that change a score, the named ones."""
    values = {
        "window": 9,
        "chunk": 7,
        "softcap": 2.5,
        "slopes": 2.0 ** -torch.arange(1, heads + 1),
        "sinks": 3 * torch.randn(heads),
    }
    return {name: values[name] for name in names}


STEPS = ([1], [1] * 9, [1, 1, 40, 3], [70])
SHAPES = [  # query heads, key/value heads, numbers of a head
    (8, 2, 32),
    (4, 4, 16),
    (7, 1, 24),
    (6, 2, 64),
    (6, 2, 80),
    (3, 3, 1),
    (2, 1, 128),
    (13, 1, 72),
]


def grown(counts: list[int]) -> list[int]:
    """Lengths of rows that compute so many tokens behind a context of any length."""
    past = torch.randint(0, 90, (len(counts),)).tolist()
    return [a + b for a, b in zip(past, counts, strict=True)]


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_attention(
    kernels: cpu.Kernels, heads: int, kv_heads: int, size: int, window: int | None, block_size: int
) -> None:
    cache = Cache(kernels, block_size, kv_heads, size)
    for counts in STEPS:
        cache.check(heads, grown(counts), counts, window=window)


@pytest.mark.parametrize(
    "names",
    [
        ("chunk",),
        ("softcap",),
        ("slopes",),
        ("sinks",),
        ("window", "softcap"),
        ("chunk", "sinks"),
        ("window", "chunk", "softcap", "slopes", "sinks"),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_attention_with_what_changes_scores(
    kernels: cpu.Kernels, heads: int, kv_heads: int, size: int, names: tuple[str, ...]
) -> None:
    cache = Cache(kernels, 5, kv_heads, size)
    for counts in STEPS:
        cache.check(heads, grown(counts), counts, **features(heads, *names))


@pytest.mark.parametrize("chunk", [1, 2, 16, 64, 1000])
def test_a_chunk_of_any_length(kernels: cpu.Kernels, chunk: int) -> None:
    cache = Cache(kernels, 16, 2, 32)
    for counts in STEPS:
        cache.check(4, grown(counts), counts, chunk=chunk)


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize(
    ("heads", "size", "value_size"),
    [
        (16, 576, 512),
        (8, 40, 32),
        (5, 40, 24),
        (23, 72, 40),
        (3, 12, 7),
        (128, 36, 36),
        (1, 64, 16),
    ],
)
def test_values_in_keys_that_all_heads_share(
    kernels: cpu.Kernels, heads: int, size: int, value_size: int, block_size: int
) -> None:
    cache = Cache(kernels, block_size, 1, size, parts=1)
    for counts in STEPS:
        cache.check(heads, grown(counts), counts, values_in_keys=value_size)
    names = ("window", "softcap", "slopes", "sinks")
    lens, counts = [300, 150], [1, 140]  # more than one stretch of values
    cache.check(heads, lens, counts, values_in_keys=value_size)
    cache.check(heads, lens, counts, values_in_keys=value_size, **features(heads, *names))


def test_values_in_keys_of_several_groups(kernels: cpu.Kernels) -> None:
    Cache(kernels, 16, 3, 40, parts=1).check(12, [260, 33], [1, 33], values_in_keys=32)


def test_a_sink_above_all_scores_takes_nearly_all_weight(kernels: cpu.Kernels) -> None:
    cache = Cache(kernels, 16, 2, 32)
    for sink in (-1e4, -30.0, 30.0):
        cache.check(4, [50], [20], sinks=torch.full((4,), sink))
    q, rows = torch.randn(1, 4, 32), cache.paged([50], [1])
    sinks = torch.full((4,), 1e4)
    got = kernels.paged_attention(q, cache.kv, rows, scale=0.3, sinks=sinks)
    assert got.abs().max() < 1e-30


def test_scores_far_beyond_their_cap(kernels: cpu.Kernels) -> None:
    cache = Cache(kernels, 16, 2, 32)
    for softcap in (1e-3, 0.1, 50.0, 1e4):
        cache.check(4, [50, 90], [1, 20], softcap=softcap)


@pytest.mark.parametrize("names", [(), ("window", "softcap", "slopes", "sinks"), ("chunk",)])
def test_attention_on_several_threads(
    kernels: cpu.Kernels, two_threads: None, names: tuple[str, ...]
) -> None:
    Cache(kernels, 16, 2, 32).check(8, [900, 200, 700], [1, 200, 300], **features(8, *names))


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 1, 320), (12, 4, 128), (11, 11, 80)])
def test_heads_of_one_long_row_are_divided_among_threads(
    kernels: cpu.Kernels, two_threads: None, heads: int, kv_heads: int, size: int, threads: int
) -> None:
    kernels.threads = threads
    cache = Cache(kernels, 16, kv_heads, size)
    cache.check(heads, [6000], [1], **features(heads, "slopes", "sinks"))
    q, rows = torch.randn(1, heads, size), cache.paged([6000], [1])
    several = kernels.paged_attention(q, cache.kv, rows, scale=0.3)
    kernels.threads = 1
    assert torch.equal(several, kernels.paged_attention(q, cache.kv, rows, scale=0.3))


def test_attention_refuses_what_does_not_fit_the_cache(kernels: cpu.Kernels) -> None:
    cache = Cache(kernels, 16, 2, 32)
    cache.rows([9])
    q, rows = torch.randn(1, 4, 32), cache.paged([9], [1])
    wrong: list[dict[str, Any]] = [
        {"values_in_keys": 16},
        {"window": 0},
        {"chunk": 0},
        {"softcap": 0.0},
        {"slopes": torch.randn(3)},
        {"sinks": torch.randn(4).double()},
        {"sinks": torch.randn(8)[::2]},
    ]
    for given in wrong:
        with pytest.raises(AssertionError):
            kernels.paged_attention(q, cache.kv, rows, scale=1, **given)
    for kv in (cache.kv.double(), cache.kv.bfloat16(), cache.kv[:, :1]):
        with pytest.raises(AssertionError):
            kernels.paged_attention(q, kv, rows, scale=1)
    k = torch.randn(1, 2, 32)
    with pytest.raises(AssertionError):
        kernels.kv_write(cache.kv, torch.tensor([3]), k, None)
    with pytest.raises(AssertionError):
        kernels.kv_write(cache.kv, torch.tensor([3]), k, k[..., :16])


def test_wrong_inputs_are_refused_before_they_reach_a_pointer(kernels: cpu.Kernels) -> None:
    matrix = kernels.matrix(torch.randn(4, 8))
    for x in (torch.randn(2, 7), torch.randn(2, 8).double(), torch.randn(8, 2).t()):
        with pytest.raises(AssertionError):
            matrix.apply(x, None)
    with pytest.raises(AssertionError):
        matrix.apply(torch.randn(2, 8), torch.randn(5))
    with pytest.raises(AssertionError):
        matrix.add(torch.randn(2, 8), None, torch.randn(1, 4))
    with pytest.raises(AssertionError):
        kernels.rms_norm(torch.randn(2, 8), torch.randn(4), 1e-5)


# The library itself.


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function instead of ours, and a fresh cache directory."""
    try:
        extension.find_compiler(extension.CPU)
    except extension.Unavailable as reason:
        pytest.skip(str(reason))
    source = tmp_path / "csrc" / "answer_cpu.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(extension, "SOURCES", (tmp_path / "absent", source.parent))
    monkeypatch.setenv("PAGEDSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PAGEDSERVE_CPU_KERNELS", raising=False)
    return source


def fresh_load() -> ctypes.CDLL | None:
    """`extension.load` without what it remembers."""
    return extension.load_once.__wrapped__()


def test_a_library_is_compiled_once(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fresh_load()
    assert library is not None and library.answer() == 42
    (made,) = (small_source.parents[1] / "cache" / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    again = fresh_load()
    assert again is not None and again.answer() == 42 and made.stat().st_mtime_ns == before
    small_source.write_text('extern "C" int answer() { return 43; }')
    changed = fresh_load()
    assert changed is not None and changed.answer() == 43


def test_without_a_compiler_there_is_one_line_and_no_library(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without = replace(extension.CPU, compilers=("no-such-compiler",))
    monkeypatch.setattr(extension, "CPU", without)
    with caplog.at_level(logging.WARNING):
        assert fresh_load() is None
    (record,) = caplog.records
    assert "no compiler for C++ kernels on the path (no-such-compiler)" in record.getMessage()


def test_a_failing_compiler_leaves_one_line_and_no_file(
    small_source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_source.write_text("#error on purpose\n")
    with caplog.at_level(logging.WARNING):
        assert fresh_load() is None
    (record,) = caplog.records
    assert "on purpose" in record.getMessage()
    assert not list((small_source.parents[1] / "cache" / "kernels").iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PAGEDSERVE_CACHE_DIR", str(small_source / "below-a-file"))
    assert fresh_load() is None
    assert len(caplog.records) == 1


def test_kernels_can_be_refused(small_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDSERVE_CPU_KERNELS", "off")
    assert fresh_load() is None
    assert not (small_source.parents[1] / "cache").exists()


def test_processes_may_compile_at_the_same_time(small_source: Path) -> None:
    code = (
        "import sys, pathlib\nfrom pagedserve.kernels import extension\n"
        "extension.SOURCES = (pathlib.Path(sys.argv[1]),)\n"
        "print(extension.load().answer())"
    )
    command = [sys.executable, "-c", code, str(small_source.parent)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == [b"42"] * 3
    assert len(list((small_source.parents[1] / "cache" / "kernels").iterdir())) == 1
