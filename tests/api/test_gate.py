"""The gate: who everybody is without keys, what can be read again, what the operator is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagedserve.api.admission import EVERYTHING, Scope
from pagedserve.api.gate import Gate
from pagedserve.api.keys import Keys
from pagedserve.config import ServerConfig


def opened(key: str | None = None, file: str | None = None, **options: Any) -> Gate:
    config = ServerConfig(port=0, api_key_file=file, **options)
    gate = Gate.opened(config, Keys(key, file))
    gate.sock.close()
    return gate


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a server on an address that others reach; here only as far as the gate knows."""
    monkeypatch.setattr("pagedserve.api.gate.is_loopback", lambda address: False)
    return {"insecure": True}


def test_without_keys_everybody_is_the_operator_on_his_machine_and_not_elsewhere(
    public: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = opened(**public).anybody
    assert stranger is not None and stranger.scope == Scope.USE | Scope.METRICS
    assert opened("k", **public).anybody is None
    monkeypatch.undo()
    operator = opened().anybody
    assert operator is not None and operator.scope == EVERYTHING
    assert opened("k").anybody is None


def test_the_operator_is_told_what_he_has_opened(
    public: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = opened(**public).warnings()
    assert line.startswith("--insecure: whoever reaches")
    (line,) = opened("k", **public).warnings()
    assert line.startswith("no --ssl-certfile: keys and texts cross the network")
    monkeypatch.undo()
    (line,) = opened(allowed_origin=("*",)).warnings()
    assert line.startswith("--allowed-origin *: any web page")
    for quiet in (opened(), opened("k"), opened("k", allowed_origin=("*",))):
        assert quiet.warnings() == []


def test_there_is_something_to_read_again_where_there_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a:one")
    assert not opened().reloads and not opened("k").reloads
    gate = opened(file=str(file))
    assert gate.reloads
    file.write_text("a:other")
    gate.reload()
    assert gate.keys.tenant(b"one") is None and gate.keys.tenant(b"other") is not None
