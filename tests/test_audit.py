""".ci/audit.py: what it finds, and that our own requirements keep to its floors."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for line in (*project["dependencies"], *sum(extras, []))]


def test_every_requirement_has_a_floor_and_a_registry(audit: ModuleType) -> None:
    for each in requirements():
        floors = [part for part in each.specifier if part.operator in (">=", "==", "~=")]
        assert len(floors) == 1 and each.url is None, each
        if each.name in audit.FLOORS:
            assert Version(floors[0].version) >= Version(audit.FLOORS[each.name][0]), each


def test_nothing_here_is_below_a_floor(audit: ModuleType) -> None:
    assert audit.below_floor(audit.installed()) == []


def test_an_old_package_is_named_with_its_hole(audit: ModuleType) -> None:
    found = audit.below_floor(
        {"jinja2": Version("3.1.5"), "h11": Version("0.16"), "x": Version("0")}
    )
    assert found == [
        "jinja2 3.1.5 is older than 3.1.6: CVE-2025-27516: a chat template leaves its sandbox"
    ]


def distribution(name: str, origin: str | None) -> Any:
    return SimpleNamespace(metadata={"Name": name}, read_text=lambda file: origin)


def test_a_package_from_elsewhere_is_named(audit: ModuleType) -> None:
    origin = json.dumps({"url": "https://example.com/x.git"})
    found = audit.from_elsewhere(
        [distribution("a", None), distribution("PagedServe", origin), distribution("B_b", origin)]
    )
    assert found == ["b-b came from https://example.com/x.git, not from a registry"]


def test_advisories_are_read_and_what_was_not_asked_is_counted(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    hole = {"id": "PYSEC-1", "fix_versions": ["2.0"]}
    report = {
        "dependencies": [
            {"name": "a", "version": "1.0", "vulns": [hole, {"id": "PYSEC-2", "fix_versions": []}]},
            {"name": "b", "version": "1.0", "vulns": []},
            {"name": "c", "skip_reason": "not found"},
        ]
    }
    told = ["a 1.0: PYSEC-1, mended in 2.0", "a 1.0: PYSEC-2, mended in no version"]
    assert audit.advisories(report) == (told, 2)
    monkeypatch.setitem(audit.IGNORED, "PYSEC-2", "why")
    assert audit.advisories(report) == (told[:1], 2)
