"""What is installed, looked at for what is known to be unsafe.

    .venv/bin/python .ci/audit.py

Exits 1 where packages do not fit each other, one came from elsewhere than a registry, one is older
than a version from which a hole that concerns us is mended, or an advisory names one. Advisories
are asked for with pip-audit, which needs the network; where it cannot ask, that is said and is no
failure, for the floors below hold without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata

from packaging.utils import canonicalize_name
from packaging.version import Version

OURS = "pagedserve"
# Package → the first version without the hole, and what that was.
FLOORS = {
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template leaves its sandbox"),
    "starlette": ("1.0.1", "CVE-2026-48710, CVE-2025-62727: paths and ranges of requests"),
    "h11": ("0.16.0", "CVE-2025-43859: where a chunked request ends"),
    "requests": ("2.32.4", "CVE-2024-47081: credentials for another host"),
    "urllib3": ("2.6.0", "CVE-2025-66418: decompression without a bound"),
    "torch": ("2.6.0", "CVE-2025-32434: weights_only loads what runs"),
}
# Advisory → why it does not concern this project.
IGNORED: dict[str, str] = {}


def installed() -> dict[str, Version]:
    """Every distribution of this environment."""
    return {
        canonicalize_name(each.metadata["Name"]): Version(each.version)
        for each in metadata.distributions()
    }


def below_floor(versions: Mapping[str, Version]) -> list[str]:
    """A line for each package with a hole that is known here."""
    return [
        f"{name} {versions[name]} is older than {floor}: {why}"
        for name, (floor, why) in FLOORS.items()
        if name in versions and versions[name] < Version(floor)
    ]


def from_elsewhere(distributions: Iterable[metadata.Distribution]) -> list[str]:
    """A line for each package that came from an address or a folder, our own left out."""
    found = []
    for each in distributions:
        name, origin = canonicalize_name(each.metadata["Name"]), each.read_text("direct_url.json")
        if origin is not None and name != OURS:
            found.append(f"{name} came from {json.loads(origin).get('url')}, not from a registry")
    return found


def advisories(report: Mapping[str, object]) -> tuple[list[str], int]:
    """(a line for each advisory of a report of pip-audit, how many packages it could ask about)."""
    found, asked = [], 0
    dependencies = report["dependencies"]
    assert isinstance(dependencies, list)
    for each in dependencies:
        asked += "skip_reason" not in each
        for hole in each.get("vulns", ()):
            if hole["id"] not in IGNORED:
                mended = ", ".join(hole["fix_versions"]) or "no version"
                found.append(f"{each['name']} {each['version']}: {hole['id']}, mended in {mended}")
    return found, asked


def ask_advisories() -> tuple[list[str], str]:
    """(what advisories say, a line on how many packages they were asked about)."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format=json"]
    command += ["--progress-spinner=off", "--timeout=10"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        report = json.loads(run.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        return [], "advisories: NOT asked, pip-audit is not installed or cannot reach them"
    found, asked = advisories(report)
    if not asked:
        return found, "advisories: NOT asked, the registry here does not have them"
    return found, f"advisories: asked about {asked} packages"


def main() -> int:
    """Look at all of it. The exit status."""
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    wrong = check.stdout.strip().splitlines() if check.returncode else []
    versions = installed()
    wrong += below_floor(versions) + from_elsewhere(metadata.distributions())
    told, line = ask_advisories()
    for each in wrong + told:
        print(f"FAIL {each}")
    print(f"{len(versions)} packages, {len(FLOORS)} floors; {line}")
    return 1 if wrong or told else 0


if __name__ == "__main__":
    sys.exit(main())
