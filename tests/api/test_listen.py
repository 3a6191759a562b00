"""Where a server may listen, and what it says where it may not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from pagedserve.api.listen import check_binding, is_loopback, listen, own_names, url
from pagedserve.config import ServerConfig
from pagedserve.errors import StartupError
from tests.api.serving import ROOT, Server


def test_an_address_for_others_needs_a_key_or_the_word_for_it() -> None:
    for address in ("0.0.0.0", "::", "192.168.1.5", "fe80::1%lo", "128.0.0.1"):
        with pytest.raises(StartupError, match="--api-key-file.*--insecure"):
            check_binding(ServerConfig(host=address), address, keys=False)
        check_binding(ServerConfig(host=address), address, keys=True)
        check_binding(ServerConfig(host=address, insecure=True), address, keys=False)
    for address in ("127.0.0.1", "::1", "127.8.8.8"):
        assert is_loopback(address)
        check_binding(ServerConfig(host=address), address, keys=False)


def test_a_name_counts_as_the_address_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = "127.0.0.1"

    def resolve(*args: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    config = ServerConfig(host="my-machine", port=0)
    with listen(config, keys=False) as sock:
        assert url(sock, tls=False) == f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert own_names(config, sock) == ["my-machine", "127.0.0.1"]
    found = "0.0.0.0"  # "localhost" too, if somebody's hosts file says so
    with pytest.raises(StartupError, match="--host localhost can be reached"):
        listen(ServerConfig(host="localhost", port=0), keys=False)
    with listen(config, keys=True) as sock:
        assert own_names(config, sock) == ["my-machine", "0.0.0.0", socket.gethostname()]


def test_an_ipv6_address_has_brackets_in_the_url() -> None:
    try:
        sock = listen(ServerConfig(host="::1", port=0), keys=False)
    except StartupError:
        pytest.skip("no IPv6 on this machine")
    with sock:
        assert url(sock, tls=True) == f"https://[::1]:{sock.getsockname()[1]}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"host": "0.0.0.0"}, "--insecure serves anybody"),
        ({"allowed_host": ["http://a.b"]}, "--allowed-host 'http://a.b' is no host"),
        ({"allowed_origin": ["a.b"]}, "--allowed-origin 'a.b' is no origin"),
        ({"ssl_keyfile": "k.pem"}, "--ssl-keyfile is for HTTPS, which needs --ssl-certfile"),
        ({"ssl_certfile": "none.pem"}, "--ssl-certfile none.pem cannot be used: No such file"),
    ],
)
def test_a_server_that_may_not_start_starts_no_engine(options: object, says: str) -> None:
    given = {"port": 0, "model": "/nowhere"} | dict(options)  # type: ignore[call-overload]
    run = subprocess.run(
        [sys.executable, "-m", "tests.api.serving", json.dumps(given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and says in run.stdout
    assert "listening" not in run.stdout and "toy" not in run.stdout and not run.stderr


def test_insecure_serves_anybody_says_so_and_gives_nobody_the_admins_scope(
    checkpoint: Path, tmp_path: Path
) -> None:
    options = {"host": "0.0.0.0", "insecure": True, "model": str(checkpoint)}
    with Server(tmp_path / "log", **options) as server:
        port = httpx.URL(server.url).port
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            assert http.get("/livez").status_code == 200
            assert http.get("/metrics").status_code == 200
            # no name of ours: a page's that was pointed here
            answer = http.get("/livez", headers={"Host": f"evil.example:{port}"})
            assert answer.json()["error"]["code"] == "host_not_allowed"
            for host in ("10.1.2.3", f"[fe80::1]:{port}", socket.gethostname(), "localhost"):
                assert http.get("/livez", headers={"Host": host}).status_code == 200
        assert "--insecure: whoever reaches this address can use the server" in server.output
