"""The table of kernels: rules for every shape, findings on disk for one GPU and one version."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest

from pagedserve.kernels import dispatch, tuning
from pagedserve.kernels.dispatch import Gemv, Library, Product, SplitK, Table, by_rule

IDENTITY = {"gpu": "one", "triton": "3.6.0"}


def test_one_row_takes_gemv_few_skinny_some_split_k_and_many_the_library() -> None:
    rows = (1, 2, 8, 16, 32, 64, 128)
    kinds = [by_rule(Product(n, 4096, 4096), 132, 90).kind for n in rows]
    assert kinds == ["gemv", "skinny", "skinny", "skinny", "split_k", "split_k", "library"]
    kinds = [by_rule(Product(n, 4096, 1024), 132, 90).kind for n in rows]
    assert kinds == ["skinny"] * 5 + ["split_k", "library"]


def test_a_row_that_is_no_multiple_of_16_bytes_is_the_library_s() -> None:
    assert by_rule(Product(1, 64, 100), 132, 90) == Library()


@pytest.mark.parametrize("columns", (8, 512, 1000, 4096, 14336))
@pytest.mark.parametrize("gated", (False, True))
def test_a_gemv_s_threads_load_16_bytes_and_hold_at_most_64_sums(columns: int, gated: bool) -> None:
    choice = dispatch.gemv_blocks(Product(1, 1000, columns, gated))
    assert choice.block_k >= 256 * choice.num_warps
    sums = choice.block_n * choice.block_k * (2 if gated else 1)
    assert sums <= 64 * 32 * choice.num_warps


@pytest.mark.parametrize("columns", (8, 512, 1024, 2048, 3072, 4096, 14336))
@pytest.mark.parametrize("rows", (1, 2, 4, 8, 16, 32))
def test_a_skinny_product_has_no_more_on_its_way_than_registers_hold(
    rows: int, columns: int
) -> None:
    for size, gated in itertools.product((1024, 8192, 100_000), (False, True)):
        choice = dispatch.skinny_blocks(Product(rows, size, columns, gated))
        assert choice.lines % 16 == 0 and choice.ahead >= 1
        lines = choice.lines + max(8, rows)  # 16-bit numbers of weights and x, by 32 threads
        registers = choice.ahead * lines * choice.block_k // 64
        assert registers <= {4: 160, 8: 160}[choice.num_warps]


def test_shares_fill_the_gpu_and_leave_each_four_steps() -> None:
    assert dispatch.shares(Product(8, 4096, 4096), 132) == 2
    assert dispatch.shares(Product(8, 1024, 2048), 132) == 4
    assert dispatch.shares(Product(8, 1024, 1024), 132) == 1
    assert dispatch.shares(Product(8, 100000, 4096), 132) == 1


@pytest.mark.parametrize(("capability", "shared"), ((80, 99), (90, 227), (120, 99)))
@pytest.mark.parametrize("size", (1000, 100000))
@pytest.mark.parametrize("gated", (False, True))
def test_stages_fit_into_the_shared_memory_of_a_block(
    capability: int, shared: int, size: int, gated: bool
) -> None:
    for rows in (16, 32, 64):
        choice = dispatch.split_blocks(Product(rows, size, 4096, gated), 132, capability)
        stage = 2 * choice.block_k * (choice.block_n * (2 if gated else 1) + rows)
        assert choice.num_stages * stage <= shared << 10
        assert not choice.early
        assert choice.num_stages * stage == dispatch.shared_bytes(
            Product(rows, size, 4096, gated), choice
        )


def test_candidates_of_tuning_fit_the_gpu_and_hold_the_library() -> None:
    for rows, gated in itertools.product((1, 2, 16, 64), (False, True)):
        for capability, shared in ((86, 99), (90, 227), (120, 99)):
            product = Product(rows, 3072, 1024, gated)
            found = tuning.candidates(product, Table(132, capability))
            assert Library() in found and len(found) > 2
            for choice in found:
                if isinstance(choice, SplitK):
                    assert dispatch.shared_bytes(product, choice) <= shared << 10


def test_findings_come_back_from_disk_and_win_over_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    product = Product(8, 4096, 1024, True)
    found = {product.key: SplitK(3, num_stages=5), "1x2x3": Gemv(1, 512, 2), "4x5x6": Library()}
    dispatch.save(Table(132, 90, dict(found)), path, IDENTITY)
    read = dispatch.findings(path, IDENTITY)
    assert read == found
    assert Table(132, 90, read).choose(product) == SplitK(3, num_stages=5)
    assert list(path.parent.iterdir()) == [path]


def test_findings_of_another_gpu_or_none_are_none(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert dispatch.findings(path, IDENTITY) == {}
    dispatch.save(Table(132, 90, {"1x2x3": Library()}), path, IDENTITY)
    assert dispatch.findings(path, IDENTITY | {"gpu": "another"}) == {}
    older = path.read_text().replace(f'"format": {dispatch.FORMAT}', '"format": 1')
    path.write_text(older)
    assert dispatch.findings(path, IDENTITY) == {}


@pytest.mark.parametrize("text", ("", "[]", '{"format": 2}', '{"format": 2, "identity": {}}'))
def test_a_file_that_is_no_table_is_said_and_not_used(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "pagedserve"):
        assert dispatch.findings(path, {}) == {}
    assert str(path) in caplog.text
