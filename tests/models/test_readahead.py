"""Weights are asked for before they are read, all of them, where there is room."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pagedserve.api import checkpoint
from pagedserve.config import Config
from pagedserve.errors import StartupError
from pagedserve.models import readahead
from pagedserve.models.readahead import STEP_BYTES, read_ahead
from tests.text.building import byte_level, write_checkpoint

Asked = list[tuple[int, int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """(size of the file, first byte, number of bytes) of every call."""
    calls: Asked = []

    def posix_fadvise(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((os.fstat(fd).st_size, offset, length))

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    return calls


def shards(directory: Path, *sizes: int) -> None:
    names = [f"model-{at}.safetensors" for at in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        (directory / name).write_bytes(bytes(size))
    index = {"weight_map": {f"tensor {name}": name for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def ask(directory: Path) -> bool:
    thread = read_ahead(directory)
    if thread is not None:
        thread.join()
    return thread is not None


def test_every_byte_of_every_shard_is_asked_for_in_order(tmp_path: Path, asked: Asked) -> None:
    sizes = (3 * STEP_BYTES + 1, 5, 2 * STEP_BYTES)
    shards(tmp_path, *sizes)
    (tmp_path / "of_another_model.safetensors").write_bytes(bytes(77))
    assert ask(tmp_path)
    wanted = [(n, at, STEP_BYTES) for n in sizes for at in range(0, n, STEP_BYTES)]
    assert asked == wanted


def test_a_single_file_is_asked_for_and_what_is_not_there_is_not(
    tmp_path: Path, asked: Asked
) -> None:
    assert not ask(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    assert ask(tmp_path) and asked == [(10, 0, STEP_BYTES)]


def test_nothing_is_asked_for_that_would_push_something_else_out(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert readahead.free_bytes() > 1 << 20
    shards(tmp_path, 100, 100)
    monkeypatch.setattr(readahead, "free_bytes", lambda: 199)
    assert not ask(tmp_path) and asked == []
    monkeypatch.setattr(readahead, "free_bytes", lambda: 200)
    assert ask(tmp_path) and len(asked) == 2


def test_an_error_is_left_to_those_who_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

    monkeypatch.setattr(os, "posix_fadvise", fail)
    shards(tmp_path, 10, 10)
    assert ask(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(StartupError, match="no weight_map"):
        read_ahead(tmp_path)


def test_the_start_asks_unless_there_are_no_weights_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path / "model", byte_level())
    found: list[Path] = []
    monkeypatch.setattr(checkpoint, "read_ahead", found.append)
    for load_format in ("dummy", "auto", "safetensors"):
        options = {"model": str(directory), "load_format": load_format}
        checkpoint.load(Config.from_options(options).model, lambda phase, detail: None)
    assert found == [directory, directory]
