"""`pagedserve build-kernels`: what is built, where it is found, what is said where it is not."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pagedserve import config
from pagedserve.cli import main
from pagedserve.kernels import extension, paged_decode_cuda


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of one function each, both by the C++ compiler, and a fresh cache."""
    try:
        extension.find_compiler(extension.CPU)
    except extension.NoCompiler as reason:
        pytest.skip(str(reason))
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "answer_cpu.cpp").write_text('extern "C" int answer() { return 1; }')
    (sources / "answer_cuda.cpp").write_text('extern "C" int answer() { return 2; }')
    cuda = replace(
        extension.CUDA, sources="*_cuda.cpp", compilers=extension.CPU.compilers, flags=("-fPIC",)
    )
    monkeypatch.setattr(extension, "SOURCES", (sources,))
    monkeypatch.setattr(extension, "CUDA", cuda)
    monkeypatch.setenv("PAGEDSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PAGEDSERVE_KERNELS_DIR", raising=False)
    monkeypatch.setenv("PAGEDSERVE_CUDA_KERNELS", "on")


def without_compiler(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recipe = replace(getattr(extension, name), compilers=("no-such-compiler",))
    monkeypatch.setattr(extension, name, recipe)


def answers(directory: Path) -> list[int]:
    return sorted(ctypes.CDLL(str(path)).answer() for path in directory.iterdir())


def test_both_are_built_into_the_cache_and_found_by_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-kernels"]) == 0
    cpu, cuda = capsys.readouterr().out.splitlines()
    assert cpu.startswith("C++ kernels for this processor: ")
    assert cuda.startswith("CUDA kernels for GPUs of capability 9.0 (sm_90a): ")
    assert answers(tmp_path / "cache/kernels") == [1, 2]
    library = extension.load_once.__wrapped__()
    assert library is not None and library.answer() == 1
    assert main(["build-kernels", "cuda"]) == 0
    assert "there already" in capsys.readouterr().out
    assert len(answers(tmp_path / "cache/kernels")) == 2


def test_what_was_built_elsewhere_serves_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ahead"
    assert main(["build-kernels", "--out", str(out)]) == 0
    assert f"PAGEDSERVE_KERNELS_DIR={out}" in capsys.readouterr().out
    assert answers(out) == [1, 2] and not (tmp_path / "cache").exists()
    monkeypatch.setenv("PAGEDSERVE_KERNELS_DIR", str(out))
    without_compiler(monkeypatch, "CPU")
    without_compiler(monkeypatch, "CUDA")
    library = extension.load_once.__wrapped__()
    assert library is not None and library.answer() == 1
    found = extension.find(extension.CUDA, config.kernel_directories())
    assert found is not None and found.parent == out
    (tmp_path / "csrc/answer_cuda.cpp").write_text('extern "C" int answer() { return 3; }')
    assert extension.find(extension.CUDA, config.kernel_directories()) is None


def test_without_a_compiler_for_one_the_other_is_built_and_the_reason_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_compiler(monkeypatch, "CUDA")
    assert main(["build-kernels"]) == 0
    said = capsys.readouterr().out
    assert "CUDA kernels: not built: no compiler for CUDA kernels on the path" in said
    assert answers(tmp_path / "cache/kernels") == [1]
    assert main(["build-kernels", "cuda"]) == 1
    assert "no-such-compiler" in capsys.readouterr().err
    without_compiler(monkeypatch, "CPU")
    assert main(["build-kernels", "--out", str(tmp_path / "none")]) == 1


def test_a_failing_compiler_and_a_wrong_kind_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "csrc/answer_cuda.cpp").write_text("#error on purpose\n")
    assert main(["build-kernels", "cuda"]) == 1
    assert "on purpose" in capsys.readouterr().err
    assert not list((tmp_path / "cache/kernels").iterdir())
    assert main(["build-kernels", "metal"]) == 1
    assert "'metal'; there are cpu, cuda" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["build-kernels", "--out", str(tmp_path / "file/below")]) == 1
    assert "cannot be built" in capsys.readouterr().err


def test_a_start_builds_what_is_missing_behind_itself_once(tmp_path: Path) -> None:
    thread = paged_decode_cuda.build_behind()
    assert thread is not None
    thread.join()
    assert answers(tmp_path / "cache/kernels") == [2]
    assert paged_decode_cuda.build_behind() is None


def test_a_start_without_nvcc_or_with_kernels_refused_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEDSERVE_CUDA_KERNELS", "off")
    assert paged_decode_cuda.build_behind() is None
    monkeypatch.setenv("PAGEDSERVE_CUDA_KERNELS", "on")
    without_compiler(monkeypatch, "CUDA")
    assert paged_decode_cuda.build_behind() is None
    assert not (tmp_path / "cache").exists()


def test_a_library_that_is_missing_or_does_not_work_is_one_line_of_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = paged_decode_cuda.load.__wrapped__
    with caplog.at_level(logging.INFO):
        assert load() is None
        assert main(["build-kernels", "cuda"]) == 0
        before = len(caplog.records)
        monkeypatch.setattr(paged_decode_cuda, "Native", no_driver)
        assert load() is None
    assert "build-kernels" in caplog.records[0].getMessage()
    (last,) = caplog.records[before:]
    assert "cudaErrorInsufficientDriver" in last.getMessage()


def no_driver(path: str) -> paged_decode_cuda.Native:
    raise OSError(f"{path}: cudaErrorInsufficientDriver")
