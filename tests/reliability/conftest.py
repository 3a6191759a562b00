"""What the tests of survival share: a server that nobody harms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import LiveServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of the demo model that tests share and do not harm."""
    live = LiveServer(tmp_path_factory.mktemp("server") / "log").ready()
    yield live
    live.stop()
