"""What stands before the routes, made before anything else is started: socket, TLS, names, keys.

    --host ─▶ socket (listen.py)     --ssl-* ─▶ TLS (tls.py)
    --allowed-* ─▶ callers.py        --api-key* ─▶ keys.py

All of it is checked here, so that a flag that cannot be honoured ends the start at once.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from pagedserve.api import tls
from pagedserve.api.admission import ANYBODY, Scope, Tenant
from pagedserve.api.callers import Callers
from pagedserve.api.keys import Keys
from pagedserve.api.listen import is_loopback, listen, own_names, url
from pagedserve.config import ServerConfig

STRANGER = Tenant(scope=Scope.USE | Scope.METRICS)  # with --insecure: changes no state


@dataclass(frozen=True, slots=True)
class Gate:
    """The open gate of one server.

    `public`: other machines reach it. `anybody`: whose requests are where no key is needed.
    """

    config: ServerConfig
    sock: socket.socket
    public: bool
    tls: ssl.SSLContext | None
    keys: Keys
    callers: Callers
    anybody: Tenant | None

    @classmethod
    def opened(cls, config: ServerConfig, keys: Keys) -> Gate:
        """Listen, with everything that was asked for. Raises StartupError."""
        context = tls.context(config)
        needed = bool(keys)
        Callers.of((), config.allowed_host, config.allowed_origin, public=False, keys=needed)
        sock = listen(config, keys=needed)
        public = not is_loopback(sock.getsockname()[0])
        callers = Callers.of(
            own_names(config, sock),
            config.allowed_host,
            config.allowed_origin,
            public=public,
            keys=needed,
        )
        anybody = None if needed else STRANGER if public else ANYBODY
        return cls(config, sock, public, context, keys, callers, anybody)

    @property
    def url(self) -> str:
        """Where it is."""
        return url(self.sock, tls=self.tls is not None)

    @property
    def reloads(self) -> bool:
        """Whether there is a file to read again."""
        return self.config.api_key_file is not None or self.tls is not None

    def reload(self) -> None:
        """Read keys and certificate again; what cannot be used changes nothing and is logged."""
        self.keys.reload()
        if self.tls is not None:
            tls.reload_certificate(self.tls, self.config)

    def warnings(self) -> list[str]:
        """What the operator should know he has opened, in lines."""
        found = []
        if self.anybody is STRANGER:
            found.append("--insecure: whoever reaches this address can use the server")
        if self.callers.any_origin and self.anybody is not None:
            found.append("--allowed-origin *: any web page that somebody here opens can use it")
        if self.public and self.anybody is None and self.tls is None:
            found.append("no --ssl-certfile: keys and texts cross the network as they are")
        return found
