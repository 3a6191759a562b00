"""Of a server with a real model: nothing goes out after its start, and what one key sends no other
finds in the cache."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import LiveServer

PATH, CHAT = "/v1/completions", "/v1/chat/completions"

# Runs in every Python process of the server before anything else, and cannot be taken out again.
SITE = """
import json, os, sys
import uvloop

OUT = os.open(os.environ["AUDIT_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
WATCHED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "pickle.", "ctypes.dlopen", "urllib.", "ftplib.", "smtplib.", "webbrowser.", "shutil.",
    "os.remove", "os.rename", "os.mkdir", "os.putenv", "uvloop.",
)
LOOP_WAYS = (
    "create_connection", "create_unix_connection", "create_datagram_endpoint", "sock_connect",
    "sock_sendto", "getaddrinfo", "getnameinfo", "subprocess_exec", "subprocess_shell",
)


def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif not event.startswith(WATCHED):
        return
    os.write(OUT, (json.dumps([os.getpid(), event, repr(arguments)[:300]]) + "\\n").encode())


sys.addaudithook(watch)


def told(name):
    # The loop's own ways out go past Python's sockets, and past its hooks.
    original = getattr(uvloop.Loop, name)

    def outer(self, *args, **options):
        sys.audit("uvloop." + name, *args)
        return original(self, *args, **options)

    setattr(uvloop.Loop, name, outer)


for name in LOOP_WAYS:
    told(name)
"""


class Audited(LiveServer):
    """A server whose processes write down what they do to the world."""

    def __init__(self, folder: Path, *flags: str):
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE)
        self.events_file = folder / "events"
        with pytest.MonkeyPatch.context() as patch:
            path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
            patch.setenv("PYTHONPATH", path)
            patch.setenv("AUDIT_FILE", str(self.events_file))
            super().__init__(folder / "log", *flags)

    def events(self) -> list[tuple[int, str, str]]:
        return [tuple(json.loads(line)) for line in self.events_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audited")
    (folder / "keys").write_text("alice:key-a\nbob:key-b\nops:key-o scope=admin\n")
    flags = ("--api-key-file", str(folder / "keys"), "--max-engine-restarts", "3")
    live = Audited(folder, *flags).ready()
    yield live
    live.stop()


def client(server: LiveServer, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, timeout=60, headers=headers)


def prompt() -> str:
    """A story nobody has told before, some blocks long."""
    return f"Once upon a time {secrets.token_hex(8)} met a fox and a hen and a cat. " * 4


def cached(http: httpx.Client, text: str) -> int:
    answer = http.post(PATH, json={"prompt": text, "max_tokens": 2, "temperature": 0}).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_no_key_finds_what_another_has_sent(audited: Audited) -> None:
    text = prompt()
    with client(audited, "key-a") as alice, client(audited, "key-b") as bob:
        assert cached(alice, text) == 0
        assert cached(alice, text) >= 32
        assert cached(bob, text) == 0
        assert cached(bob, text) >= 32 and cached(alice, text) >= 32
        # the other way round, and by the model's own template
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}

        def of_chat(http: httpx.Client) -> int:
            usage = http.post(CHAT, json=chat).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert of_chat(bob) == 0 and of_chat(alice) == 0 and of_chat(bob) > 0


def test_a_holders_keys_share_and_all_do_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice:key-a\nalice:key-a2\nbob:key-b\n")
    flags = ("--api-key-file", str(tmp_path / "keys"), "--share-prefix-cache")
    live = LiveServer(tmp_path / "log", *flags).ready()
    try:
        text = prompt()
        with client(live, "key-a") as a, client(live, "key-b") as b, client(live, "key-a2") as a2:
            assert cached(a, text) == 0
            assert cached(a2, text) >= 32 and cached(b, text) >= 32
    finally:
        live.stop()


def test_nothing_goes_out_after_the_start(audited: Audited) -> None:
    before = audited.events()
    begun = {event for _, event, _ in before}
    # The hook sees both processes, and what it is there for.
    assert "subprocess.Popen" in begun and "socket.bind" in begun
    pids = {audited.process.pid, audited.engine_pid()}
    assert pids <= {pid for pid, _, _ in before}
    everything(audited)
    # An object of that kind is made for each connection that is taken.
    new = audited.events()[len(before) :]
    assert not [each for each in new if each[1] != "socket.__new__"]
    assert not foreign_sockets(audited, pids)


def everything(server: LiveServer) -> None:
    """Requests of every kind, good and bad, that might lead somebody to reach out."""
    links = "http://127.0.0.1:1/x https://example.com/image.png file:///etc/passwd org/some-model"
    with client(server, "key-o") as http:
        for body in (
            {"prompt": links, "max_tokens": 3},
            {"prompt": links, "max_tokens": 3, "stream": True, "logprobs": 2},
            {"prompt": ["a", "b"], "n": 2, "seed": 1, "stop": ["x"], "top_p": 0.5},
            {"prompt": "x", "model": "org/another-model"},
            {"prompt": "x", "model": "/etc/passwd"},
            {"prompt": 5},
        ):
            assert http.post(PATH, json=body).status_code < 500
        parts = [
            {"type": "text", "text": links},
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
        ]
        for content in (links, parts, parts[:1]):
            for stream in (False, True):
                messages = [{"role": "user", "content": content}]
                body = {"messages": messages, "max_tokens": 4, "stream": stream}
                assert http.post(CHAT, json=body).status_code < 500
        http.post(PATH, json={"prompt": "é" * 20_000})  # in a thread
        for path in ("/v1/models", "/v1/models/org/other", "/metrics", "/health", "/version", "/x"):
            assert http.get(path).status_code < 500
    assert server.get("/livez")[0] == 200 and server.get("/metrics")[0] == 401


def foreign_sockets(server: LiveServer, pids: set[int]) -> list[str]:
    """Connections of the processes that do not end at the server's own port.

    The kernel's tables, because not every library tells Python's audit hooks.
    """
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if (target := os.readlink(link)).startswith("socket:["):
                    inodes.add(target[8:-1])
    port = f":{httpx.URL(server.url).port:04X}"
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        try:
            lines = Path(f"/proc/{server.process.pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, inode = line.split()[1], line.split()[9]
            if inode in inodes and not local.endswith(port):
                found.append(f"{table} {line}")
    return found


def test_the_look_at_sockets_sees_a_foreign_one() -> None:
    class Fake:
        url = "http://127.0.0.1:1"
        process = type("Process", (), {"pid": os.getpid()})

    server: Callable[..., object] = Fake  # type: ignore[assignment]
    before = foreign_sockets(server, {os.getpid()})  # type: ignore[arg-type]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assert len(foreign_sockets(server, {os.getpid()})) == len(before) + 1  # type: ignore[arg-type]


def test_the_engine_does_not_inherit_the_key(tmp_path: Path) -> None:
    code = (
        "from pagedserve.engine.client import EngineClient; import pathlib, time\n"
        "client = EngineClient()\n"
        "while not (seen := pathlib.Path(f'/proc/{client.pid}/environ').read_bytes()):\n"
        "    time.sleep(0.01)\n"
        "client.close(0.1)\n"
        "print(b'hunter22' in seen, b'OTHER=1' in seen)\n"
    )
    environment = {**os.environ, "PAGEDSERVE_API_KEY": "hunter22", "OTHER": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout == "False True\n", run.stderr
