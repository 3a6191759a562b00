"""A directory passes through; a hub id is found in the cache or fetched; an error says what to do.

The hub is a server of this machine (`fake_hub.py`); huggingface_hub is the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from pagedserve.errors import StartupError
from pagedserve.models import hub
from pagedserve.models.convert import convert
from pagedserve.models.hub import fetch
from pagedserve.models.hub.progress import Progress
from tests.models.fake_hub import FakeHub, etag

NAME = "someone/model"
COMMIT = "a" * 40


def content(num_bytes: int, seed: int) -> bytes:
    return bytes((seed * 7 + i * i) % 251 for i in range(num_bytes))


FILES = {
    "config.json": b'{"model_type": "x"}',
    "tokenizer.json": content(20_000, 1),
    "tokenizer_config.json": b'{"legacy": true}',
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": b"""{"weight_map": {
        "x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}""",
    "model-00001-of-00002.safetensors": content(300_000, 2),
    "model-00002-of-00002.safetensors": content(50_000, 3),
}
UNWANTED = {
    "README.md": b"# a model",
    "pytorch_model.bin": content(400_000, 4),
    "pytorch_model.bin.index.json": b"{}",
    "model.fp32-00001-of-00001.safetensors": content(90_000, 5),
    "consolidated.safetensors": content(90_000, 6),
    "original/consolidated.00.pth": content(90_000, 7),
    "onnx/config.json": b"{}",
    "modeling_model.py": b"print('no')",
    "trainer_state.json": b"{}",
}
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model, and an empty cache."""
    fake = FakeHub()
    fake.add(NAME, {**FILES, **UNWANTED}, revisions={"main": COMMIT, "v1": "b" * 40})
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "FIRST_WAIT_SECONDS", 0.001)
    yield fake
    fake.close()


def there(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


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


@pytest.mark.parametrize("name", ("./model", "~/model", "a/b/c", "not an id", "", "a/..", "a--b/c"))
def test_what_can_only_be_a_path_never_reaches_the_hub(
    name: str, server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError, match="there is no directory|no model directory"):
        hub.resolve(name)
    assert not server.requests


def test_only_what_serving_needs_is_fetched_and_the_second_time_nothing(server: FakeHub) -> None:
    directory = hub.resolve(NAME)
    assert there(directory) == FILES
    asked = {path for path, _ in server.requests}
    assert not any(name in path for path in asked for name in UNWANTED)
    assert all(server.fetched(f"/resolve/{COMMIT}/{name}") == [None] for name in FILES)
    server.requests.clear()
    assert hub.resolve(NAME) == hub.resolve(NAME, offline=True) == directory
    assert hub.resolve(NAME, COMMIT) == directory
    assert not server.requests


def test_other_tools_find_what_was_fetched(server: FakeHub, tmp_path: Path) -> None:
    directory = hub.resolve(NAME)
    server.requests.clear()
    found = huggingface_hub.snapshot_download(NAME, local_files_only=True)
    assert Path(found) == directory
    info = huggingface_hub.scan_cache_dir(tmp_path / "cache")
    assert not info.warnings
    (repo,) = info.repos
    assert (repo.repo_id, repo.size_on_disk) == (NAME, sum(map(len, FILES.values())))
    assert not server.requests


def test_a_model_of_one_file_needs_no_index(server: FakeHub) -> None:
    files = {"config.json": b"{}", "model.safetensors": content(30_000, 8)}
    server.add("one/file", {**files, "model.fp16.safetensors": content(30_000, 9)})
    assert there(hub.resolve("one/file")) == files


def test_a_cut_connection_goes_on_where_it_stopped(server: FakeHub) -> None:
    server.cuts[FIRST] = [100_000, 0, 150_000]
    assert there(hub.resolve(NAME)) == FILES
    ranges = server.fetched(f"/cdn/{NAME}/{FIRST}")
    assert ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=250000-"]


def test_what_an_ended_process_has_left_is_not_fetched_again(server: FakeHub) -> None:
    server.cuts[FIRST] = [200_000] + [0] * fetch.ATTEMPTS
    with pytest.raises(
        StartupError, match=r"broke off at 200\.0 of 300\.0 kB of .*run the same again"
    ):
        hub.resolve(NAME)
    server.cuts.clear()
    server.requests.clear()
    assert there(hub.resolve(NAME)) == FILES
    assert server.fetched(FIRST) == ["bytes=200000-", "bytes=200000-"]  # the second by redirect
    assert not server.fetched("tokenizer.json")


def test_a_server_without_ranges_is_read_from_the_beginning(server: FakeHub) -> None:
    server.cuts[FIRST], server.ranges = [100_000, 299_999], False
    assert there(hub.resolve(NAME)) == FILES


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(server: FakeHub) -> None:
    hub.resolve(NAME, weights=False)
    answer = server.server.RequestHandlerClass.resolve

    def busy_once(handler: Any, *arguments: str) -> None:
        server.server.RequestHandlerClass.resolve = answer
        handler.fail(503, "")

    server.server.RequestHandlerClass.resolve = busy_once
    assert there(hub.resolve(NAME)) == FILES


def test_bytes_that_are_not_those_of_the_hash_are_not_kept(server: FakeHub, tmp_path: Path) -> None:
    for name in ("config.json", FIRST):
        server.damaged = {name}
        with pytest.raises(StartupError, match=f"{name} arrived damaged"):
            hub.resolve(NAME)
    server.damaged.clear()
    assert there(hub.resolve(NAME)) == FILES


def test_an_unfinished_file_that_was_damaged_is_found_out(server: FakeHub, tmp_path: Path) -> None:
    blobs = tmp_path / "cache" / "models--someone--model" / "blobs"
    blobs.mkdir(parents=True)
    unfinished = blobs / f"{etag(FILES[FIRST])}.incomplete"
    unfinished.write_bytes(b"wrong" * 100)
    with pytest.raises(StartupError, match="arrived damaged"):
        hub.resolve(NAME)
    unfinished.write_bytes(b"wrong" * 100_000)  # longer than the file: cannot be its beginning
    assert there(hub.resolve(NAME)) == FILES


def test_a_file_cut_off_in_the_cache_is_fetched_anew_by_pull(server: FakeHub) -> None:
    directory = hub.resolve(NAME)
    os.truncate(directory / FIRST, 1234)
    server.requests.clear()
    assert hub.pull(NAME) == directory
    assert there(directory) == FILES
    assert not server.fetched("tokenizer.json")


def test_two_at_once_fetch_every_byte_once(server: FakeHub) -> None:
    server.cuts[FIRST] = [1000]
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(hub.pull(NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert there(found[0]) == FILES
    assert server.fetched(f"/cdn/{NAME}/{FIRST}") == [None, "bytes=1000-"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(server: FakeHub, tmp_path: Path) -> None:
    tagged, main = hub.resolve(NAME, "v1"), hub.resolve(NAME)
    assert (tagged.name, main.name) == ("b" * 40, COMMIT)
    server.requests.clear()
    assert hub.resolve(NAME, "v1", offline=True) == hub.resolve(NAME, "b" * 40) == tagged
    assert not server.requests
    with pytest.raises(StartupError, match="no revision 'v3' on the hub"):
        hub.resolve(NAME, "v3")
    with pytest.raises(StartupError, match="no someone/model at v3; .*pull .*--revision v3"):
        hub.resolve(NAME, "v3", offline=True)


def test_a_new_commit_is_seen_by_pull_and_not_by_resolve(server: FakeHub) -> None:
    old = hub.resolve(NAME)
    model = server.models[NAME]
    model.revisions["main"] = "c" * 40
    model.files["config.json"] = b'{"model_type": "y"}'
    assert hub.resolve(NAME) == old
    server.requests.clear()
    new = hub.pull(NAME)
    assert new.name == "c" * 40 and hub.resolve(NAME) == new
    assert there(new) == FILES | {"config.json": model.files["config.json"]}
    assert [path for path, _ in server.requests if "/resolve/" in path] == [
        f"/{NAME}/resolve/{'c' * 40}/config.json"
    ]


def test_offline_says_what_is_missing_and_asks_nobody(server: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"--offline is set, and the cache .* has no someone/mo"):
        hub.resolve(NAME, offline=True)
    assert not server.requests
    directory = hub.resolve(NAME)
    (directory / FIRST).unlink()
    server.requests.clear()
    with pytest.raises(StartupError, match=rf"lacks {FIRST}; .*pagedserve pull {NAME}$"):
        hub.resolve(NAME, offline=True)
    assert not server.requests
    assert there(hub.resolve(NAME)) == FILES


def test_dummy_weights_need_no_weights(server: FakeHub) -> None:
    directory = hub.resolve(NAME, weights=False)
    assert there(directory).keys() == {name for name in FILES if not name.startswith("model-")}
    assert hub.resolve(NAME, weights=False, offline=True) == directory
    with pytest.raises(StartupError, match="lacks model-00001.*, model-00002"):
        hub.resolve(NAME, offline=True)


def test_a_tokenizer_need_be_no_model(server: FakeHub, tmp_path: Path) -> None:
    files = {"tokenizer.json": content(12_000, 1), "tokenizer_config.json": b"{}"}
    server.add("just/words", {**files, "README.md": b""})
    with pytest.raises(StartupError, match="no model to serve"):
        hub.resolve("just/words")
    directory = hub.resolve_tokenizer("just/words")
    assert there(directory) == files
    server.requests.clear()
    assert hub.resolve_tokenizer("just/words", offline=True) == directory
    assert hub.resolve_tokenizer(str(tmp_path)) == tmp_path
    with pytest.raises(StartupError, match="the cache .* has no other/words"):
        hub.resolve_tokenizer("other/words", offline=True)
    assert not server.requests


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"gated": True}, r"is gated: accept its terms at http.*/some/other, then log in"),
        ({"private": True}, "no hub model of this name.*log in"),
    ),
)
def test_a_model_that_may_not_be_read_says_how(
    options: dict[str, bool], words: str, server: FakeHub
) -> None:
    server.add("some/other", FILES, **options)
    with pytest.raises(StartupError, match=words):
        hub.resolve("some/other")


def test_a_token_is_shown_to_the_hub_and_to_nobody_else(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.cdn = server.url.replace("127.0.0.1", "localhost")
    assert there(hub.resolve(NAME)) == FILES
    shown = {path for path, token in server.tokens.items() if token == "Bearer hf_secret"}
    hidden = {path for path, token in server.tokens.items() if token is None}
    assert f"/api/models/{NAME}/revision/main" in shown
    assert f"/{NAME}/resolve/{COMMIT}/{FIRST}" in shown
    assert hidden == {path for path in server.tokens if path.startswith("/cdn/")} != set()


@pytest.mark.parametrize(
    "bad", ({"sha": "../../.."}, {"blobId": "../../x"}, {"blobId": None}, {"size": None})
)
def test_a_listing_that_is_none_writes_nothing(
    bad: dict[str, Any], server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"rfilename": "config.json", "size": 2, "blobId": "d" * 40} | bad
    body = {"id": NAME, "sha": bad.get("sha", COMMIT), "siblings": [file]}

    def info(handler: Any, name: str, revision: str) -> None:
        content = {"Content-Type": "application/json"}
        handler.answer(200, json.dumps(body).encode(), content)

    monkeypatch.setattr(server.server.RequestHandlerClass, "info", info)
    with pytest.raises(StartupError, match="does not list the files of someone/model"):
        hub.resolve(NAME)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("answer", (b"<html>log in first</html>", b"[]", b"{}"))
def test_an_answer_of_something_else_is_said(
    answer: bytes, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(handler: Any, name: str, revision: str) -> None:
        handler.answer(200, answer, {"Content-Type": "text/html"})

    monkeypatch.setattr(server.server.RequestHandlerClass, "info", info)
    with pytest.raises(StartupError, match="cannot be asked for someone/model.*HF_ENDPOINT"):
        hub.resolve(NAME)


def test_a_name_that_is_none_is_said(server: FakeHub) -> None:
    with pytest.raises(StartupError, match="no hub model of this name"):
        hub.resolve("nobody/nothing")


def test_no_network_is_said_with_the_hub_that_was_asked(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StartupError, match=r"hub at http://127\.0\.0\.1:9 cannot be reached"):
        hub.resolve(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match="HF_HUB_OFFLINE is set"):
        hub.resolve(NAME)


def test_a_hub_that_is_broken_is_said(server: FakeHub) -> None:
    server.busy = 1
    with pytest.raises(StartupError, match="cannot be reached.*503"):
        hub.resolve(NAME)


def test_a_disk_without_room_is_said_before_any_weight_is_fetched(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Any) -> Any:
        return SimpleNamespace(free=300_000 + (64 << 20))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(StartupError, match=r"needs 350 kB more in .* 67\.4 MB free.*HF_HOME"):
        hub.resolve(NAME)
    assert not server.fetched(FIRST)


def test_a_disk_that_fills_up_is_said(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "write", full)
    with pytest.raises(StartupError, match=f"cannot download {NAME} into .*: No space left"):
        hub.resolve(NAME)


def test_an_index_that_names_what_the_hub_has_not_is_said(server: FakeHub) -> None:
    del server.models[NAME].files[FIRST]
    with pytest.raises(StartupError, match=f"lacks files of its index: {FIRST}"):
        hub.resolve(NAME)


def pickled_model() -> dict[str, bytes]:
    import io

    import torch

    file = io.BytesIO()
    torch.save({"x": torch.arange(4000.0)}, file)
    small = {name: FILES[name] for name in ("config.json", "tokenizer.json")}
    noise = {"optimizer.pt": content(50_000, 1), "training_args.bin": content(50_000, 2)}
    return {**small, "pytorch_model.bin": file.getvalue(), **noise}


def test_pickled_weights_are_refused_before_they_are_fetched(server: FakeHub) -> None:
    server.add("old/model", pickled_model())
    words = (
        r"pickles only \(pytorch_model\.bin; 17\.\d kB\).*pull old/model --include-bin && .*conv"
    )
    for get in (hub.resolve, hub.pull):
        with pytest.raises(StartupError, match=words):
            get("old/model")
    assert len(server.requests) == 2


def test_pickled_weights_can_be_pulled_converted_and_resolved(server: FakeHub) -> None:
    server.add("old/model", pickled_model())
    directory = hub.pull("old/model", pickles=True)
    assert there(directory).keys() == {"config.json", "tokenizer.json", "pytorch_model.bin"}
    assert hub.missing(directory) == ["model.safetensors"]
    convert(hub.pulled("old/model"))
    server.requests.clear()
    assert hub.resolve("old/model") == directory
    assert not server.requests
    assert hub.pull("old/model") == directory
    assert len(server.requests) == 1


def test_a_model_without_weights_is_said(server: FakeHub) -> None:
    server.add("only/gguf", {"config.json": b"{}", "model.gguf": content(20_000, 1)})
    with pytest.raises(StartupError, match="neither model.safetensors nor"):
        hub.resolve("only/gguf")


def test_progress_tells_files_bytes_and_the_time_left(server: FakeHub) -> None:
    told: list[tuple[str, str]] = []
    counted: list[tuple[int, ...]] = []

    def tell(phase: str, detail: str, *counts: int) -> None:
        told.append((phase, detail))
        counted.append(counts)

    hub.resolve(NAME, on_progress=tell)
    assert counted[-1][0] == counted[-1][1] and 370_150 < counted[-1][0] < 370_250
    assert {phase for phase, _ in told} == {f"downloading {NAME}"}
    assert told[-1][1].startswith("8/8 files, 370.2 of 370.2 kB (100 %)")

    now = [100.0]
    progress = Progress(lambda text, *_: told.append(("", text)), lambda: now[0])
    progress.expect(3, 16_000_000_000)
    progress.found(1_000_000_000)
    for _ in range(30):
        now[0] += 1.0
        progress.arrived(100_000_000)
        progress.report()
    progress.finished()
    progress.report()  # told a second ago: not yet
    now[0] += 0.6
    progress.report()
    assert [text for _, text in told[-2:]] == [
        "0/3 files, 4.0 of 16.0 GB (25 %), 100 MB/s, 2:00 left",
        "1/3 files, 4.0 of 16.0 GB (25 %), 93.8 MB/s, 2:08 left",
    ]
    progress.waits(1)  # what is told changes, so the start does not look as if it hung
    now[0] += 75.0
    progress.report()
    assert told[-1][1].endswith(", waiting 1:15 for another process that fetches the same")


def test_the_api_process_can_import_it_without_torch() -> None:
    code = (
        "import sys, pagedserve.models.hub, pagedserve.models.hub.download, pagedserve.spec;"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
