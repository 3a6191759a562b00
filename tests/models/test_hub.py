"""A directory passes through; a hub id is found in the cache, or the error says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from pagedserve.errors import StartupError
from pagedserve.models import hub


class FakeHub:
    """`snapshot_download` as the tests want it: a cached path, an error, or a download."""

    def __init__(self, cached: Path | None = None, answer: Path | Exception | None = None):
        self.cached, self.answer = cached, answer
        self.downloads: list[dict[str, Any]] = []

    def __call__(self, model: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            if self.cached is None:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cached)
        self.downloads.append({"model": model, **options})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeHub) -> FakeHub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def snapshot(directory: Path, *files: str) -> Path:
    directory.mkdir()
    for name in files:
        (directory / name).write_text("{}")
    return directory


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid"))


def test_a_model_directory_passes_through(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("empty", "no config.json"),
        ("file", "is a file"),
        ("missing/deep/path", "there is no directory"),
    ),
)
def test_what_is_no_model_directory_is_said(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=words):
        hub.resolve(str(tmp_path / name))


@pytest.mark.parametrize("name", ("./model", "~/model", "a/b/c", "not an id", ""))
def test_what_can_only_be_a_path_never_reaches_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, FakeHub())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError):
        hub.resolve(name)
    assert not fake.downloads


def test_a_whole_snapshot_in_the_cache_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = snapshot(tmp_path / "cached", "config.json", "model.safetensors")
    fake = install(monkeypatch, FakeHub(cached))
    assert hub.resolve("someone/model") == cached
    assert not fake.downloads


def test_a_snapshot_that_lacks_a_shard_is_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = snapshot(tmp_path / "cached", "config.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (cached / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = snapshot(tmp_path / "whole", "config.json", "model.safetensors")
    fake = install(monkeypatch, FakeHub(cached, whole))
    told: list[str] = []
    assert hub.resolve("someone/model", "v2", told.append) == whole
    assert told == ["downloading someone/model from the Hugging Face hub"]
    assert fake.downloads[0]["revision"] == "v2"
    assert "*.safetensors" in fake.downloads[0]["allow_patterns"]
    assert not any("bin" in pattern for pattern in fake.downloads[0]["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "words"),
    (
        (OfflineModeIsEnabled("offline"), "cannot be reached"),
        (httpx.ConnectError("no route"), "cannot be reached"),
        (LocalEntryNotFoundError("no network"), "cannot be reached"),
        (GatedRepoError("gated", response=response(403)), "accept its terms"),
        (RepositoryNotFoundError("who", response=response(404)), "no hub model of this name"),
        (OSError(28, "no space left on device"), "no space left"),
    ),
)
def test_an_error_of_the_hub_says_what_to_do(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeHub(answer=error))
    with pytest.raises(StartupError, match=words):
        hub.resolve("someone/model")


def test_a_hub_model_without_safetensors_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pickled = snapshot(tmp_path / "pickled", "config.json", "pytorch_model.bin")
    install(monkeypatch, FakeHub(answer=pickled))
    with pytest.raises(StartupError, match="safetensors"):
        hub.resolve("someone/model")


def test_the_api_process_can_import_it_without_torch() -> None:
    code = (
        "import sys, pagedserve.models.hub, pagedserve.spec;"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
