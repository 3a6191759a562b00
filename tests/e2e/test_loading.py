"""From a model's name to its first token, through the command line, over a hub of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import tiny_checkpoint
from tests.e2e.conftest import LiveServer
from tests.models.fake_hub import FakeHub

NAME = "some-lab/tiny"
SHARD = "model-00002-of-00006.safetensors"
CUT = 60_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in shards, with a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint("llama", directory, max_shard_size="100KB", tokenizer=True)
    assert len(list(directory.glob("*.safetensors"))) == 6
    assert (directory / SHARD).stat().st_size > CUT
    return directory


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the model, for every process started from here."""
    fake = FakeHub()
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    fake.add(NAME, {**files, "pytorch_model.bin": bytes(500_000), "README.md": b"hello"})
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    yield fake
    fake.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], LiveServer]]:
    """`pagedserve serve MODEL`; killed at the end if it is still there."""
    started = []

    def begin(model: str) -> LiveServer:
        started.append(LiveServer(tmp_path / f"log{len(started)}", model))
        return started[-1]

    yield begin
    for server in started:
        server.stop()


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pagedserve", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, standard output, standard error."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def until(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def unfinished(tmp_path: Path) -> list[int]:
    sizes = []
    for path in (tmp_path / "home").rglob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # it became whole between the two looks
            sizes.append(path.stat().st_size)
    return sizes


def complete(server: LiveServer) -> str:
    body = {"model": NAME, "prompt": "abc", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(json.load(response)["choices"][0]["text"])


def engines_of(pid: int) -> list[str]:
    """Engine processes that this process has started and that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pagedserve.engine.process" in command and str(pid).encode() in command:
            found.append(path.parent.name)
    return found


def test_a_pull_that_was_killed_goes_on_and_serve_then_asks_nobody(
    hub: FakeHub, serve: Callable[[str], LiveServer], tmp_path: Path
) -> None:
    hub.cuts[SHARD] = [CUT]
    hub.flowing.clear()  # the connection stalls there
    first = start("pull", NAME)
    until(lambda: CUT in unfinished(tmp_path))
    first.kill()
    first.communicate()
    hub.flowing.set()

    hub.requests.clear()
    status, out, err = run("pull", NAME)
    assert (status, err) == (0, "")
    assert f"next: pagedserve serve {NAME}" in out
    assert hub.fetched(f"/cdn/{NAME}/{SHARD}") == [f"bytes={CUT}-"]
    assert not any("pytorch_model" in path or "README" in path for path, _ in hub.requests)
    assert not unfinished(tmp_path)

    hub.requests.clear()
    server = serve(NAME).ready()
    text = complete(server)
    assert server.interrupt() == 0
    status, out, err = run("generate", "abc", "--model", NAME, "--max-tokens", "4", "--offline")
    assert (status, out) == (0, text + "\n"), err
    assert not hub.requests


def test_a_pull_on_a_terminal_draws_a_bar_and_elsewhere_writes_lines(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, "-m", "pagedserve", "pull", NAME]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(ours, 4096):
                drawn += part
        os.close(ours)
    assert process.returncode == 0
    bar = rb"\r\x1b\[Kdownloading \S+ 1\d/1\d files, [\d.]+ of [\d.]+ kB \(100 %\) \[#{10,24}\]\r\n"
    assert re.search(bar, drawn), drawn
    out = run("pull", NAME)[1]
    assert "\r" not in out and "\x1b" not in out
    assert out.splitlines()[0].startswith(f"downloading {NAME} ")


def test_serve_tells_how_far_the_download_is_and_survives_a_cut(
    hub: FakeHub, serve: Callable[[str], LiveServer], tmp_path: Path
) -> None:
    hub.cuts[SHARD] = [CUT]
    hub.flowing.clear()
    server = serve(NAME)
    until(lambda: CUT in unfinished(tmp_path))
    far = rf"downloading {NAME} \d/\d+ files, [\d.]+ of [\d.]+ kB \(\d+ %\)"
    until(lambda: re.search(far, server.get("/health")[1]))
    assert server.get("/readyz")[0] == 503
    status, body = server.get("/v1/models")
    assert status == 503 and f"downloading {NAME}" in body
    hub.flowing.set()
    server.ready()
    assert complete(server)
    assert server.interrupt() == 0
    assert f"  downloading {NAME} " in server.text()
    assert hub.fetched(f"/cdn/{NAME}/{SHARD}") == [None, f"bytes={CUT}-"]


def test_ctrl_c_ends_a_download_at_once(
    hub: FakeHub, serve: Callable[[str], LiveServer], tmp_path: Path
) -> None:
    hub.cuts[SHARD] = [CUT]
    hub.flowing.clear()
    pull, server = start("pull", NAME, "--revision", "main"), serve(NAME)
    until(lambda: CUT in unfinished(tmp_path))
    until(lambda: "downloading" in server.text())  # it waits for what the other one fetches
    begun = time.monotonic()
    for process in (pull, server.process):
        process.send_signal(signal.SIGINT)
    assert pull.wait(10) == 130
    assert server.process.wait(10) == 0
    assert time.monotonic() - begun < 10
    pull.communicate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["pull", NAME, "--revision", "v9"], f"{NAME} has no revision 'v9' on the hub"),
        (["pull", "some-lab/gated"], "some-lab/gated is gated: accept its terms at"),
        (["serve", "some-lab/nothing", "--port", "0"], "no hub model of this name"),
        (["generate", "x", "--model", NAME, "--offline"], "--offline is set, and the cache"),
        (["serve", "some-lab/pickles", "--port", "0"], "pagedserve pull some-lab/pickles --includ"),
    ),
)
def test_what_cannot_be_had_is_one_line_and_status_1(
    arguments: list[str], words: str, hub: FakeHub
) -> None:
    config = {"config.json": b"{}"}
    hub.add("some-lab/gated", {**config, "model.safetensors": bytes(20_000)}, gated=True)
    hub.add("some-lab/pickles", {**config, "pytorch_model.bin": bytes(20_000)})
    status, _, err = run(*arguments)
    assert status == 1
    last = err.splitlines()[-1]
    assert last.startswith("pagedserve: ") and words in last
    assert "Traceback" not in err
    assert not any(path.startswith("/cdn/") for path, _ in hub.requests)
    assert bool(hub.requests) == ("--offline" not in arguments)


def damage_cut(directory: Path) -> str:
    os.truncate(directory / SHARD, CUT)
    return f"{directory / SHARD} is cut off or damaged ({CUT} bytes)"


def damage_header(directory: Path) -> str:
    with (directory / SHARD).open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\xfe")
    return f"{directory / SHARD} is cut off or damaged"


def damage_absent(directory: Path) -> str:
    (directory / SHARD).unlink()
    return f"{directory} lacks shards of model.safetensors.index.json: {SHARD}"


def damage_garbage(directory: Path) -> str:
    (directory / SHARD).write_bytes(b"<html>not found</html>")
    return f"{directory / SHARD} is cut off or damaged (22 bytes)"


@pytest.mark.parametrize("damage", (damage_cut, damage_header, damage_absent, damage_garbage))
def test_a_damaged_shard_ends_the_start_and_leaves_nothing(
    damage: Callable[[Path], str], copy: Path, serve: Callable[[str], LiveServer]
) -> None:
    words = damage(copy)
    server = serve(str(copy))
    assert server.process.wait(60) == 1
    last = server.text().splitlines()[-1]
    assert last.startswith("pagedserve: ") and words in last
    assert "Traceback" not in server.text()
    assert not engines_of(server.process.pid)
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))


def test_pickles_are_refused_with_a_command_that_helps(copy: Path, tmp_path: Path) -> None:
    wanted = run("generate", "abc", "--model", str(copy), "--max-tokens", "4")
    assert wanted[0] == 0, wanted
    tensors = {}
    for file in copy.glob("*.safetensors"):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        file.unlink()
    (copy / "model.safetensors.index.json").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")

    status, _, err = run("generate", "abc", "--model", str(copy), "--max-tokens", "4")
    assert status == 1
    command = re.search(r"pagedserve (convert \S+)", err)
    assert command
    status, out, err = run(*command[1].split())
    assert (status, err) == (0, "") and "pytorch_model.bin -> " in out
    assert run("generate", "abc", "--model", str(copy), "--max-tokens", "4")[:2] == wanted[:2]


def test_pickles_of_the_hub_are_pulled_converted_and_served(
    hub: FakeHub, model: Path, tmp_path: Path
) -> None:
    files = hub.models[NAME].files
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    tensors = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
    torch.save(tensors, tmp_path / "pickle")
    files["pytorch_model.bin"] = (tmp_path / "pickle").read_bytes()

    status, out, err = run("pull", NAME, "--include-bin")
    assert (status, err) == (0, "") and out.endswith(f"next: pagedserve convert {NAME}\n")
    status, out, err = run("convert", NAME)
    assert (status, err) == (0, "") and out.endswith(f"next: pagedserve serve {NAME}\n")
    hub.requests.clear()
    status, out, err = run("generate", "abc", "--model", NAME, "--max-tokens", "4", "--offline")
    assert status == 0 and out, err
    assert not hub.requests
