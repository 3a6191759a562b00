"""Where the server listens, whether it may, and by which names it is called there.

--host ─▶ address ─┬─ of this machine only ─────────────────▶ socket
                   └─ others reach it ─▶ keys, or --insecure ─▶ socket
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from pagedserve.config import ServerConfig
from pagedserve.errors import StartupError

BACKLOG = 2048


def listen(config: ServerConfig, *, keys: bool) -> socket.socket:
    """The listening socket. Connections wait in it until the application is imported.

    Raises StartupError where it may not, or cannot, be made.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    address = resolved(config.host, config.port, family)
    check_binding(config, address[0], keys=keys)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise StartupError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}; "
            "choose another with --port"
        ) from error
    sock.listen(BACKLOG)
    return sock


def resolved(host: str, port: int, family: socket.AddressFamily) -> Any:
    """`host` and `port` as `bind` takes them. Raises StartupError for a name that is none."""
    try:
        return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartupError(
            f"--host {host} cannot be resolved: {reason}; give an address of this machine"
        ) from error


def check_binding(config: ServerConfig, address: str, *, keys: bool) -> None:
    """Raise StartupError for an `address` that others reach, without keys and not meant so."""
    if keys or config.insecure or is_loopback(address):
        return
    raise StartupError(
        f"--host {config.host} can be reached from other machines, and no API key is set: anybody "
        "could use this server. Give keys with --api-key-file (or one with PAGEDSERVE_API_KEY or "
        "--api-key), or listen on 127.0.0.1; --insecure serves anybody."
    )


def is_loopback(address: str) -> bool:
    """True for addresses that only this machine reaches."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def own_names(config: ServerConfig, sock: socket.socket) -> list[str]:
    """What clients may call this server: where it listens, and the machine if others reach it."""
    address = sock.getsockname()[0]
    names = [config.host, address]
    return names if is_loopback(address) else [*names, socket.gethostname()]


def url(sock: socket.socket, *, tls: bool) -> str:
    """Where `sock` listens, as a URL."""
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
