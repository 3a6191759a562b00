"""Where a request may come from: the names this server is called by, and the web pages that use it.

    Host    not one of ours      403   a page whose own name was pointed at this machine (rebinding)
    Origin  of no allowed page   403   a page that sends what it has no right to read
    preflight of an allowed one  204   what a browser asks before a page's request; computes nothing

A browser sends both headers truthfully whatever the page wants. Others may write into them what
they like: keys are for those. A page of this server itself (same origin) is always allowed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedserve.errors import ForbiddenError, RequestError, StartupError

if TYPE_CHECKING:
    from starlette.datastructures import Headers

ANY = "*"
HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d{1,5})?", re.ASCII)
NAME = re.compile(r"[\w.-]+|[0-9A-Fa-f:.]+", re.ASCII)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[\w.-]*(\[[0-9a-f:.]+\])?(:\d{1,5})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Callers:
    """What the Host and Origin headers of a request may say.

    `names`: of this server, in lower case, addresses without brackets. `addresses`: any address is
    one of ours too: rebinding needs a name. `any_name`: keys protect instead. `origins`: of pages.
    """

    names: frozenset[str]
    addresses: bool
    any_name: bool
    origins: frozenset[str]

    @classmethod
    def of(
        cls,
        own_names: Iterable[str],
        allowed_hosts: Iterable[str],
        allowed_origins: Iterable[str],
        *,
        public: bool,
        keys: bool,
    ) -> Callers:
        """For a server that is called by `own_names`, and on `public` addresses by any address.

        Where keys protect a public one, and no names are given, any name will do. Raises
        StartupError for a host or an origin that could never match.
        """
        hosts = frozenset(map(checked_host, allowed_hosts))
        return cls(
            names=frozenset(name.lower() for name in own_names) | hosts,
            addresses=public,
            any_name=ANY in hosts or (public and keys and not hosts),
            origins=frozenset(map(checked_origin, allowed_origins)),
        )

    @property
    def any_origin(self) -> bool:
        """Whether every web page may use this server."""
        return ANY in self.origins

    def check_host(self, headers: Headers, http_version: str) -> None:
        """Raise for a Host that is none of ours, or is not given once."""
        given = headers.getlist("host")
        if not given and http_version == "1.0":
            return  # no browser asks so
        if len(given) != 1:
            raise RequestError("send the header Host, once", code="bad_host")
        if not self._is_ours(given[0]):
            raise ForbiddenError(
                "this server is not called by the name in the Host header; whoever runs it can "
                "allow more with --allowed-host",
                code="host_not_allowed",
            )

    def _is_ours(self, host: str) -> bool:
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].strip("[]").lower().removesuffix(".")
        if self.any_name or name in self.names or name == "localhost":
            return True
        address = as_address(name)
        return address is not None and (self.addresses or address.is_loopback)

    def check_origin(self, headers: Headers, scheme: str) -> str | None:
        """The origin of the page that asks, if it is another's and allowed; None for no page.

        Raises ForbiddenError for a page that may not.
        """
        given = headers.getlist("origin")
        if not given:
            return None
        origin = given[0].lower()
        if len(given) == 1:
            if self.any_origin or origin in self.origins:
                return given[0]
            if is_own(origin, headers.get("host", "").lower(), scheme):
                return None
        raise ForbiddenError(
            "web pages of this origin may not use this server; whoever runs it can allow them with "
            "--allowed-origin",
            code="origin_not_allowed",
        )


def is_own(origin: str, host: str, scheme: str) -> bool:
    """Whether a page of `origin` came from this server, which it calls by `host`.

    Behind a proxy that ends TLS the page's scheme is https and ours is http.
    """
    page_scheme, separator, page_host = origin.partition("://")
    return bool(separator) and page_host == host and page_scheme in ("https", scheme)


def as_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """`name` as the address that it is, or None."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def checked_host(given: str) -> str:
    """A value of --allowed-host as it is compared. Raises StartupError."""
    name = given.lower().removeprefix("[").removesuffix("]").removesuffix(".")
    if given != ANY and not (NAME.fullmatch(name) and (":" not in name or as_address(name))):
        raise StartupError(
            f"--allowed-host {given!r:.128} is no host: give a name or an address without scheme, "
            "port and path, such as llm.example.com, or * for any"
        )
    return name


def checked_origin(given: str) -> str:
    """A value of --allowed-origin as it is compared. Raises StartupError."""
    origin = given.lower()
    if given != ANY and not ORIGIN.fullmatch(origin):
        raise StartupError(
            f"--allowed-origin {given!r:.128} is no origin: give scheme and host, with the port if "
            "it is not the usual one, and no path, such as https://app.example.com, or * for any"
        )
    return origin
