"""Which Host and Origin headers are let through: a matrix, and random noise."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from pagedserve.api.callers import Callers, checked_host, checked_origin, is_own
from pagedserve.errors import ForbiddenError, RequestError, StartupError

OWN = ("localhost", "127.0.0.1")


def callers(
    *hosts: str, origins: tuple[str, ...] = (), public: bool = False, keys: bool = False
) -> Callers:
    names = ("0.0.0.0", "box") if public else OWN
    return Callers.of(names, hosts, origins, public=public, keys=keys)


def lets_host(rules: Callers, *hosts: str, version: str = "1.1") -> bool:
    raw = [(b"host", host.encode("latin-1")) for host in hosts]
    try:
        rules.check_host(Headers(raw=raw), version)
    except RequestError:
        return False
    return True


def origin_of(rules: Callers, *origins: str, host: str = "localhost:8000", scheme: str = "http"):
    raw = [(b"host", host.encode()), *((b"origin", each.encode()) for each in origins)]
    return rules.check_origin(Headers(raw=raw), scheme)


LOCAL = [
    *("localhost", "LOCALHOST:8000", "localhost.", "localhost.:1", "127.0.0.1", "127.0.0.1:8000"),
    *("127.9.9.9", "[::1]", "[::1]:8000"),
]
ADDRESSES = ["192.168.1.5", "10.0.0.1:8000", "[fe80::1]:8000", "8.8.8.8"]
NAMES = ["evil.example", "localhost.evil.example", "127.0.0.1.nip.example", "box2", "xlocalhost"]
BROKEN = [
    *("", " ", "localhost:", "localhost:123456", "localhost:a", "[::1", "::1", "a b", "a/b", "a@b"),
    *("http://localhost", "localhost,evil", "[localhost]", "localhost..", "é", "127.1", "[::1]x"),
    *("0x7f000001", "2130706433", "127.0.0.1#", "localhost\t", "localhost\0"),
]


@pytest.mark.parametrize(
    ("rules", "addresses", "names"),
    [
        (callers(), False, False),
        (callers(keys=True), False, False),
        (callers(public=True), True, False),
        (callers("a.example", public=True, keys=True), True, False),
        (callers(public=True, keys=True), True, True),
        (callers("*"), True, True),
    ],
    ids=["loopback", "loopback with keys", "insecure", "names given", "public", "any"],
)
def test_the_matrix_of_hosts(rules: Callers, addresses: bool, names: bool) -> None:
    assert [host for host in LOCAL if not lets_host(rules, host)] == []
    assert {lets_host(rules, host) for host in ADDRESSES} == {addresses}
    assert {lets_host(rules, host) for host in NAMES} == {names}
    for host in BROKEN:
        # "127.1" and the like are names to us: whatever resolves them is asked by a browser
        assert not lets_host(rules, host) or (names and host.replace(".", "").isalnum()), host
    assert not lets_host(rules) and not lets_host(rules, "localhost", "localhost")
    assert lets_host(rules, version="1.0")


def test_names_that_were_given_are_ours_whatever_their_case() -> None:
    rules = callers("LLM.Example.com", "[FE80::2]", "b.example.")
    for host in (
        "llm.example.com",
        "LLM.EXAMPLE.COM:443",
        "[fe80::2]:1",
        "b.example",
        "b.example.",
    ):
        assert lets_host(rules, host)
    for host in ("example.com", "x.llm.example.com", "llm.example.com.evil", "fe80::2"):
        assert not lets_host(rules, host)


@pytest.mark.parametrize(
    "given",
    ["", "http://a", "a:80", "a/b", "a b", "*.a", "[::1]:80", "a,b", "é", "x" * 10_000 + "/"],
)
def test_a_host_that_could_never_match_ends_the_start(given: str) -> None:
    with pytest.raises(StartupError, match="--allowed-host") as refused:
        checked_host(given)
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    "given",
    ["", "null", "a.example", "https://a/", "https://a/b", "https://a:1:2", "https://*", "://a"],
)
def test_an_origin_that_could_never_match_ends_the_start(given: str) -> None:
    with pytest.raises(StartupError, match="--allowed-origin"):
        checked_origin(given)


def test_origins_that_were_given_and_no_others() -> None:
    rules = callers(origins=("https://App.example", "http://[::1]:3", "chrome-extension://abc"))
    assert origin_of(rules) is None
    for origin in ("https://app.example", "HTTPS://APP.EXAMPLE", "http://[::1]:3"):
        assert origin_of(rules, origin) == origin
    assert origin_of(rules, "chrome-extension://abc") == "chrome-extension://abc"
    for origin in (
        *("http://app.example", "https://app.example:444", "https://app.example.evil", "null", ""),
        *("https://app.example/", "https://app.example, https://evil", "https://sub.app.example"),
    ):
        with pytest.raises(ForbiddenError, match="--allowed-origin"):
            origin_of(rules, origin)
    with pytest.raises(ForbiddenError):  # which of the two is the page's?
        origin_of(rules, "https://app.example", "https://app.example")
    anything = callers(origins=("*",))
    assert anything.any_origin and origin_of(anything, "null") == "null"


def test_a_page_of_this_server_may_use_it() -> None:
    rules = callers()
    assert origin_of(rules, "http://localhost:8000") is None
    assert origin_of(rules, "http://127.0.0.1:8000", host="127.0.0.1:8000") is None
    # a proxy that ends TLS
    assert origin_of(rules, "https://llm.example", host="LLM.example") is None
    assert origin_of(rules, "https://llm.example", host="llm.example", scheme="https") is None
    for origin, host, scheme in (
        ("http://localhost:3000", "localhost:8000", "http"),
        ("http://localhost", "localhost:8000", "http"),
        ("http://127.0.0.1:8000", "localhost:8000", "http"),
        (
            "http://llm.example",
            "llm.example",
            "https",
        ),  # a page that anybody on the way could write
        ("ftp://localhost:8000", "localhost:8000", "http"),
        ("localhost:8000", "localhost:8000", "http"),
        ("://", "", "http"),
    ):
        with pytest.raises(ForbiddenError):
            origin_of(rules, origin, host=host, scheme=scheme)
    assert not is_own("", "", "http")


@given(st.text(st.characters(max_codepoint=255), max_size=60))
@example("localhost@evil.example")
@example("evil.example#localhost")
def test_noise_is_no_name_of_ours(host: str) -> None:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    name = name.lower().removesuffix(".")
    ours = name in ("localhost", "[::1]") or name.startswith("127.")
    assert ours or not lets_host(callers(), host)
