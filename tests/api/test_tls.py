"""HTTPS with certificates that are made here: served, renewed, asked of clients, refused."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pagedserve.api import tls
from pagedserve.config import ServerConfig
from pagedserve.errors import StartupError
from tests.api.serving import Server

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make keys")


@dataclass
class Pair:
    """A certificate that signed itself, and its key."""

    cert: str
    key: str


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def pair(folder: Path, name: str, *, phrase: str | None = None) -> Pair:
    made = Pair(str(folder / f"{name}.pem"), str(folder / f"{name}-key.pem"))
    lock = ["-nodes"] if phrase is None else ["-passout", f"pass:{phrase}"]
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *lock),
        *("-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", made.key, "-out", made.cert),
    )
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    return {name: pair(folder, name) for name in ("first", "second", "client")}


def trusting(cert: str, client: Pair | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=cert)
    if client is not None:
        made.load_cert_chain(client.cert, client.key)
    return made


def shown(url: httpx.URL) -> str:
    """The certificate that a new connection sees."""
    return ssl.get_server_certificate((url.host, url.port or 443))


def secure_server(tmp_path: Path, checkpoint: Path, trusted: ssl.SSLContext, **options: object):
    server = Server(tmp_path / "log", model=str(checkpoint), **options)
    server.http.close()
    server.http = httpx.Client(base_url=server.url, timeout=20, verify=trusted)
    return server


def test_a_server_speaks_https_and_only_that(
    checkpoint: Path, tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    first, second = pairs["first"], pairs["second"]
    live = Pair(str(tmp_path / "live.pem"), str(tmp_path / "live-key.pem"))
    shutil.copy(first.cert, live.cert)
    shutil.copy(first.key, live.key)
    options = {"ssl_certfile": live.cert, "ssl_keyfile": live.key}
    with secure_server(tmp_path, checkpoint, trusting(first.cert), **options) as server:
        assert server.url.startswith("https://127.0.0.1:")
        server.until_ready()
        own = {"Origin": server.url}
        body = {"prompt": "hi", "max_tokens": 3}
        assert server.http.post("/v1/completions", json=body, headers=own).status_code == 200
        stream = server.http.post("/v1/completions", json=body | {"stream": True})
        assert stream.text.endswith("data: [DONE]\n\n")
        # a page that came over plain HTTP is not this server's
        plain = {"Origin": server.url.replace("https", "http")}
        assert server.http.get("/livez", headers=plain).status_code == 403
        url = httpx.URL(server.url)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{url.port}/livez")
        with socket.create_connection((url.host, url.port)) as raw:
            old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
            with pytest.warns(DeprecationWarning):
                old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, OSError)):
                old.wrap_socket(raw)
        assert shown(url) == Path(first.cert).read_text()

        # Half of a renewal changes nothing; both do, and connections that are open go on.
        shutil.copy(second.cert, live.cert)
        server.signal(signal.SIGHUP)
        until(lambda: "the certificate from before stays in force" in server.output)
        assert shown(url) == Path(first.cert).read_text()
        shutil.copy(second.key, live.key)
        server.signal(signal.SIGHUP)
        until(lambda: "--ssl-certfile was read again" in server.output)
        assert shown(url) == Path(second.cert).read_text()
        assert server.http.get("/livez").status_code == 200
        server.signal()
        assert server.exit_status() == 0
        assert "Traceback" not in server.output


def until(true: object) -> None:
    deadline = time.monotonic() + 5
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_clients_must_show_a_certificate_where_roots_are_given(
    checkpoint: Path, tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    first, client = pairs["first"], pairs["client"]
    options = {
        "ssl_certfile": first.cert,
        "ssl_keyfile": first.key,
        "ssl_ca_certs": client.cert,
        "api_key": "k",
    }
    with secure_server(tmp_path, checkpoint, trusting(first.cert, client), **options) as server:
        assert server.http.get("/livez").status_code == 200
        assert server.http.get("/v1/models").status_code == 401  # it is no key
        for stranger in (None, pairs["second"]):
            with (
                httpx.Client(base_url=server.url, verify=trusting(first.cert, stranger)) as http,
                pytest.raises(httpx.HTTPError),
            ):
                http.get("/livez")
        assert "Traceback" not in server.output


def test_files_that_cannot_be_used_are_named(tmp_path: Path, pairs: dict[str, Pair]) -> None:
    first, second = pairs["first"], pairs["second"]
    locked = pair(tmp_path, "locked", phrase="secret")
    (tmp_path / "noise.pem").write_text("noise")
    noise, none = str(tmp_path / "noise.pem"), str(tmp_path / "none.pem")

    def refused(**options: str) -> str:
        with pytest.raises(StartupError) as error:
            tls.context(ServerConfig(**options))
        return error.value.message

    assert refused(ssl_certfile=none) == (
        f"--ssl-certfile {none} cannot be used: No such file or directory"
    )
    for cert, key in ((noise, first.key), (first.cert, second.key), (first.cert, noise)):
        said = refused(ssl_certfile=cert, ssl_keyfile=key)
        assert "no certificate and key that fit each other in PEM form" in said
    assert "no certificate and key" in refused(ssl_certfile=first.cert)  # no key in it
    said = refused(ssl_certfile=locked.cert, ssl_keyfile=locked.key)
    assert "the key is encrypted; give one without a pass phrase" in said
    said = refused(ssl_certfile=first.cert, ssl_keyfile=first.key, ssl_ca_certs=noise)
    assert said.startswith(f"--ssl-ca-certs {noise} cannot be used: there is no certificate")
    for alone in ({"ssl_keyfile": first.key}, {"ssl_ca_certs": first.cert}):
        assert "needs --ssl-certfile" in refused(**alone)
    assert tls.context(ServerConfig()) is None
    both = tmp_path / "both.pem"
    both.write_text(Path(first.cert).read_text() + Path(first.key).read_text())
    assert tls.context(ServerConfig(ssl_certfile=str(both))) is not None
