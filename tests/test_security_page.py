"""SECURITY.md names files, tests, flags and routes that there are."""

from __future__ import annotations

import re
from pathlib import Path

from pagedserve.api.app import ROUTES
from pagedserve.api.keys import SCOPES
from pagedserve.config import each_option

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()


def test_its_files_and_tests_exist() -> None:
    found = re.findall(r"`((?:[\w.]+/)*\.?[\w]+\.py)`", PAGE)
    assert len(found) > 15
    for name in found:
        inside = (ROOT / "pagedserve" / name).exists()
        assert inside or (ROOT / name).exists(), name
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, name


def test_its_flags_exist() -> None:
    flags = {"--" + option.name.replace("_", "-") for _, option in each_option()}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= flags


def test_it_tells_of_every_scope_and_every_open_route() -> None:
    for scope in SCOPES:
        assert f"`{scope}`" in PAGE
    for _, path, needs, _ in ROUTES:
        assert needs is not None or f"`{path}`" in PAGE, path
