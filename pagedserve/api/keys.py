"""Who may use the server: API keys of a file, as digests, with each one's scope, share and quotas.

    # name : key                                        options
    alice:sk-3kX…
    bob:sha256:9f86d081884c7d659a2feaa0c55ad015…        weight=2 requests-per-minute=600
    nightly:sk-77…                                      weight=0.5 concurrent=4 priority=10
    prometheus:sk-x0…                                   scope=metrics

Several lines of one name are several keys of one tenant, so that keys change without a gap. The
file is looked at again at most once a second, when a request comes, and when `reload` is called;
one that cannot be used now changes nothing and is told in the log, once. Keys themselves are not
kept.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagedserve.api.admission import ANYBODY, EVERYTHING, Clock, Scope, Tenant
from pagedserve.errors import StartupError

log = logging.getLogger("pagedserve")

NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}")
HASHED = "sha256:"
MAX_KEYS = 1000  # all are compared for every request, 0.3 us each
MAX_FILE_BYTES = 1 << 20
LOOK_SECONDS = 1.0

Signature = tuple[int, int, int]


class Keys:
    """The keys of one server: one from a flag, those of a file, or both.

    Raises StartupError for a file that cannot be used, with the number of the line.
    """

    def __init__(self, single: str | None, file: str | None, clock: Clock = time.monotonic):
        self.tenants: tuple[Tenant, ...] = ()
        self._single = single
        self._path = Path(file) if file is not None else None
        self._clock = clock
        self._ids = {ANYBODY.name: ANYBODY.id}  # of a name, for as long as the process lives
        self._entries: list[tuple[bytes, Tenant]] = []
        self._digests: frozenset[bytes] = frozenset()
        self._seen: Signature | None = None
        self._look_at = 0.0
        self._read()

    def __bool__(self) -> bool:
        """True where a key is needed."""
        return self._single is not None or self._path is not None

    def tenant(self, given: bytes) -> Tenant | None:
        """Whose key `given` is; None for nobody's."""
        self._look()
        digest, found = hashlib.sha256(given).digest(), None
        # All of them, in constant time: nothing shows in how long the answer took.
        for known, tenant in self._entries:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found

    def is_one(self, digest: bytes) -> bool:
        """Whether that is the SHA-256 of a key: to keep it out of the log, and for nothing else."""
        return digest in self._digests

    def reload(self) -> None:
        """Read the file now. One that cannot be used changes nothing, and the log says why."""
        if self._path is None:
            return
        try:
            if self._path.exists() and not self._path.is_file():  # a pipe's reader waits for ever
                self._seen = self._signature()
                raise StartupError(f"--api-key-file {self._path} is no plain file to read again")
            self._read()
            log.warning("--api-key-file was read again: %d keys", len(self._entries))
        except StartupError as error:
            log.error("%s; the keys from before stay in force", error.message)

    def _look(self) -> None:
        """Read the file again if it has changed."""
        now = self._clock()
        if self._path is None or now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        if self._signature() != self._seen:
            self.reload()

    def _read(self) -> None:
        self._seen = self._signature()
        tenants: dict[str, Tenant] = {}
        entries: list[tuple[bytes, Tenant]] = []
        if self._path is not None:
            entries = self._parse(self._text(self._path), tenants)
        if self._single is not None:
            tenant = tenants.setdefault(ANYBODY.name, ANYBODY)
            entries.append((hashlib.sha256(self._single.encode()).digest(), tenant))
        self._entries, self.tenants = entries, tuple(tenants.values())
        self._digests = frozenset(digest for digest, _ in entries)

    def _signature(self) -> Signature | None:
        if self._path is None:
            return None
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    @staticmethod
    def _text(path: Path) -> str:
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise StartupError(
                f"--api-key-file {path} cannot be read: {error.strerror or error}"
            ) from error
        if len(data) > MAX_FILE_BYTES:
            raise StartupError(f"--api-key-file {path} is longer than {MAX_FILE_BYTES} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise StartupError(f"--api-key-file {path} is no UTF-8 text") from error

    def _parse(self, text: str, tenants: dict[str, Tenant]) -> list[tuple[bytes, Tenant]]:
        entries: list[tuple[bytes, Tenant]] = []
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            try:
                name, digest = read_key(words[0])
                made = read_options(Tenant(self._id(name), name, best_priority=0), words[1:])
                if made != tenants.setdefault(name, made):
                    raise ValueError(f"the lines of {name!r} differ in their options")
                if any(digest == known for known, _ in entries):
                    raise ValueError("this key stands in the file twice")
            except ValueError as error:
                # The line itself is not shown: it holds a key.
                raise StartupError(f"--api-key-file {self._path}, line {number}: {error}") from None
            entries.append((digest, made))
        if not entries:
            raise StartupError(f"--api-key-file {self._path} holds no key; give a name:key a line")
        if len(entries) > MAX_KEYS:
            raise StartupError(
                f"--api-key-file {self._path} holds {len(entries)} keys; {MAX_KEYS} are allowed"
            )
        return entries

    def _id(self, name: str) -> int:
        return self._ids.setdefault(name, len(self._ids))


def read_key(word: str) -> tuple[str, bytes]:
    """The name and the key's SHA-256 from `name:key` or `name:sha256:HEX`. Raises ValueError."""
    name, colon, key = word.partition(":")
    if not colon or not NAME.fullmatch(name):
        raise ValueError(
            "a line is name:key, the name 1 to 64 letters, digits or any of . _ - @, "
            "and no space in the key"
        )
    if key.startswith(HASHED):
        digest = key.removeprefix(HASHED).lower()
        if not DIGEST.fullmatch(digest):
            raise ValueError("behind sha256: there must be 64 hexadecimal digits")
        return name, bytes.fromhex(digest)
    if not key:
        raise ValueError(f"the key of {name!r} is empty")
    return name, hashlib.sha256(key.encode()).digest()


def read_options(tenant: Tenant, words: list[str]) -> Tenant:
    """`tenant` with what `words` say, such as `weight=2`. Raises ValueError."""
    if len({word.partition("=")[0] for word in words}) < len(words):
        raise ValueError("an option stands there twice")
    changes: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in OPTIONS:
            raise ValueError(f"there is no option {name[:32]!r}; there are {', '.join(OPTIONS)}")
        field, read = OPTIONS[name]
        changes[field] = read(name, text)
    return replace(tenant, **changes)


Read = Callable[[str, str], Any]  # an option's name and text → its value; raises ValueError


def number(kind: Callable[[str], float], low: float, high: float) -> Read:
    """Reads an int or a float from `low` to `high`."""

    def read(name: str, text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # NaN compares false
            what = "an integer" if kind is int else "a number"
            raise ValueError(f"{name} must be {what} from {low:g} to {high:g}")
        return value

    return read


def scope(name: str, text: str) -> Scope:
    """Reads what a key opens."""
    if text not in SCOPES:
        raise ValueError(f"{name} must be one of {', '.join(SCOPES)}")
    return SCOPES[text]


SCOPES = {"use": Scope.USE, "metrics": Scope.METRICS, "admin": EVERYTHING}

# option: (field of Tenant, how its text is read)
OPTIONS: dict[str, tuple[str, Read]] = {
    "scope": ("scope", scope),
    "weight": ("weight", number(float, 0.001, 1000)),
    "requests-per-minute": ("requests_per_minute", number(int, 0, 1_000_000)),
    "concurrent": ("max_open", number(int, 0, 1_000_000)),
    "priority": ("best_priority", number(int, -1000, 1000)),
}
