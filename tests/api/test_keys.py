"""The file of keys: its form, its errors, its reload; and a server with two keys."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from pagedserve.api.admission import ANYBODY, EVERYTHING, Scope, Tenant
from pagedserve.api.keys import MAX_KEYS, Keys
from pagedserve.errors import RequestError, StartupError
from tests.api.serving import Server
from tests.api.test_admission import Clock

HEX = hashlib.sha256(b"b-key").hexdigest()
NEVER = 6664


def write(path: Path, text: str) -> str:
    """`path` with `text`, seen as changed whatever the clock of the file system does."""
    number = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(number + 10**9, number + 10**9))
    return str(path)


def test_lines_are_keys_with_their_options(tmp_path: Path) -> None:
    text = f"# staff\n\nalice:k:1é\n  bob:sha256:{HEX.upper()} weight=2 concurrent=3\n"
    text += "alice:k2\nnight:n priority=5 requests-per-minute=60 weight=0.5\r\n"
    keys = Keys(None, write(tmp_path / "keys", text))
    alice = Tenant(1, "alice", best_priority=0)
    assert keys.tenant("k:1é".encode()) == keys.tenant(b"k2") == alice
    assert keys.tenant(b"b-key") == Tenant(2, "bob", 2.0, max_open=3, best_priority=0)
    assert keys.tenant(b"n") == Tenant(3, "night", 0.5, 60, best_priority=5)
    for wrong in (b"", b"k", b"sha256:" + HEX.encode(), HEX.encode(), b"alice:k2"):
        assert keys.tenant(wrong) is None
    assert [tenant.name for tenant in keys.tenants] == ["alice", "bob", "night"]


def test_the_flags_key_is_a_tenant_beside_those_of_the_file(tmp_path: Path) -> None:
    alone = Keys("one", None)
    assert alone and alone.tenant(b"one") == ANYBODY
    both = Keys("one", write(tmp_path / "keys", "a:k"))
    assert both.tenant(b"one") == ANYBODY and both.tenant(b"k") is not None
    assert len(both.tenants) == 2
    assert not Keys(None, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("# a:b", "holds no key"),
        ("nocolon", "line 1: a line is name:key"),
        ("a b:key", "line 1: a line is name:key"),
        ("\na:", "line 2: the key of 'a' is empty"),
        ("a:sha256:12", "64 hexadecimal digits"),
        ("a:k\nb:k", "line 2: this key stands in the file twice"),
        ("a:k\na:l weight=2", "the lines of 'a' differ"),
        ("a:k speed=2", "there is no option 'speed'; there are scope, weight"),
        ("a:k scope=root", "scope must be one of use, metrics, admin"),
        ("a:k weight=0", "weight must be a number from 0.001 to 1000"),
        ("a:k weight=nan", "weight must be a number"),
        ("a:k concurrent=1.5", "concurrent must be an integer"),
        ("a:k weight", "weight must be a number"),
        ("a:k weight=1 weight=2", "an option stands there twice"),
        ("\n".join(f"a:k{at}" for at in range(MAX_KEYS + 1)), "1000 are allowed"),
        ("x" * (2 << 20), "longer than"),
    ],
)
def test_a_bad_file_is_refused_with_the_line_and_without_a_key(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(StartupError, match=says) as refused:
        Keys(None, write(tmp_path / "keys", text))
    assert "k" not in refused.value.message.partition(": ")[2].split()
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        Keys(None, str(tmp_path / "none"))
    (tmp_path / "bytes").write_bytes(b"a:\xff")
    with pytest.raises(StartupError, match="no UTF-8"):
        Keys(None, str(tmp_path / "bytes"))


def test_a_key_opens_what_its_line_says(tmp_path: Path) -> None:
    text = "a:k1\nb:k2 scope=use\nc:k3 scope=metrics weight=2\nd:k4 scope=admin"
    keys = Keys("one", write(tmp_path / "keys", text))
    found = {key: keys.tenant(key) for key in (b"k1", b"k2", b"k3", b"k4", b"one")}
    assert {key: tenant and tenant.scope for key, tenant in found.items()} == {
        b"k1": Scope.USE,
        b"k2": Scope.USE,
        b"k3": Scope.METRICS,
        b"k4": EVERYTHING,
        b"one": EVERYTHING,
    }
    # The holder of the flag's key is one of the file's where the file names him.
    named = Keys("one", write(tmp_path / "keys", "default:k scope=use"))
    found_one = named.tenant(b"one")
    assert found_one is not None and found_one.scope == Scope.USE


def test_a_reload_looks_at_once_and_tells_what_came_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = Clock(), tmp_path / "keys"
    keys = Keys(None, write(path, "a:one"), clock)
    assert keys.tenant(b"one") is not None  # so it is not looked at for a second
    write(path, "a:two")
    keys.reload()
    assert keys.tenant(b"one") is None and keys.tenant(b"two") is not None
    write(path, "broken")
    keys.reload()
    assert keys.tenant(b"two") is not None
    Keys("alone", None).reload()
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "two" not in caplog.text and "broken" not in caplog.text


def test_digests_are_known_after_a_reload_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = Keys("flag", write(path, f"a:one\nb:sha256:{HEX}"))
    for key in (b"flag", b"one", b"b-key"):
        assert keys.is_one(hashlib.sha256(key).digest())
    write(path, "a:two")
    keys.reload()
    known = [keys.is_one(hashlib.sha256(key).digest()) for key in (b"flag", b"one", b"two")]
    assert known == [True, False, True]


def test_a_changed_file_holds_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = Clock(), tmp_path / "keys"
    keys = Keys(None, write(path, "a:one\nb:two"), clock)
    before = keys.tenant(b"two")
    write(path, "c:zero\nb:two\na:new")
    assert keys.tenant(b"one") is not None  # looked at a moment ago
    clock.now += 2
    assert keys.tenant(b"one") is None and keys.tenant(b"new") is not None
    assert keys.tenant(b"two") == before  # whoever has a number keeps it
    caplog.clear()
    caplog.set_level(logging.ERROR)
    write(path, "broken")
    for _ in range(3):
        clock.now += 2
        assert keys.tenant(b"new") is not None
    path.unlink()
    for _ in range(3):
        clock.now += 2
        assert keys.tenant(b"new") is not None
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        f"--api-key-file {path}, line 1",
        f"--api-key-file {path} cannot be read",
    ]
    write(path, "d:last")
    clock.now += 2
    assert keys.tenant(b"new") is None and keys.tenant(b"last") is not None


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("a:k-one\n")
    clock = Clock()
    keys = Keys(None, str(path), clock)
    path.unlink()
    os.mkfifo(path)
    for _ in range(3):
        clock.now += 2.0
        assert keys.tenant(b"k-one") is not None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "is no plain file" in caplog.text


def test_a_key_gives_its_requests_no_better_priority_than_its_own() -> None:
    usual, night = Tenant(1, "a", best_priority=0), Tenant(2, "n", best_priority=5)
    assert [usual.priority(None), usual.priority(3), night.priority(None)] == [0, 3, 5]
    assert Tenant().priority(-7) == -7
    with pytest.raises(RequestError, match="at least 5 for this API key, got 4"):
        night.priority(4)


def test_a_server_tells_keys_apart(checkpoint: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "keys", "flood:f concurrent=3\nother:o scope=admin\nslow:s requests-per-minute=2"
    )
    options = {"api_key_file": path, "max_num_seqs": 4, "max_queued_requests": 2}
    with Server(tmp_path / "log", model=str(checkpoint), **options) as server, ExitStack() as stack:
        while server.http.get("/readyz").status_code != 200:
            pass
        server.http.headers["Authorization"] = "Bearer o"

        def post(key: str, **body: object) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return server.http.post(
                "/v1/completions", json={"prompt": "hi"} | body, headers=headers
            )

        for _ in range(3):
            stack.enter_context(
                server.http.stream(
                    "POST",
                    "/v1/completions",
                    json={"prompt": "hi", "seed": NEVER, "stream": True},
                    headers={"Authorization": "Bearer f"},
                )
            )
        refused = post("f")
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            429,
            "rate_limit_exceeded",
        )
        assert post("o", max_tokens=3).status_code == 200  # while another key has its fill
        assert [post("s").status_code for _ in range(3)] == [200, 200, 429]
        assert 1 <= int(post("s").headers["Retry-After"]) <= 30
        assert post("x").status_code == 401
        bad = post("o", priority=-1)
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "priority")
        stack.close()
        server.wait_for("live_sequences", 0)
        assert server.metric("rejected_requests_total", reason="rate") == 2
        assert server.metric("rejected_requests_total", reason="concurrency") == 1
        assert server.metric("key_generation_tokens_total", key="other") == 3
        assert server.metric("key_generation_tokens_total", key="flood") == 0
        write(Path(path), "other:o2")
        deadline = 200
        while post("o").status_code != 401 and deadline:
            deadline -= 1
            time.sleep(0.05)
        assert post("o").status_code == 401 and post("o2").status_code == 200
        write(Path(path), "other:o3")
        server.signal(signal.SIGHUP)
        while server.output.count("--api-key-file was read again") < 2:
            time.sleep(0.02)
        assert post("o2").status_code == 401 and post("o3").status_code == 200
        assert "Traceback" not in server.output
