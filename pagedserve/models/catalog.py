"""Which architectures can be served, how, and what was tested: `pagedserve models`, docs/models.md.

    catalog.json         tests of natives, and what came of every class of transformers in the
                         fallback; `python -m tests.models.try_fallback` writes it
    catalog_others.json  what other servers serve, as read in their sources
    the registry         which native families there are

`catalog_page` makes docs/models.md of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedserve.models.architectures.registry import ARCHITECTURES, Family

FILE = Path(__file__).with_suffix(".json")
OTHERS = FILE.with_name("catalog_others.json")


@dataclass(frozen=True, slots=True)
class Native:
    """A family of ours. `names`: its classes, all read by one function. `oracle`: who says in the
    tests what its logits are ("" for nobody); `configs`: with how many it is asked.
    `second_witness`: whether it is also equal through transformers' own modeling."""

    names: tuple[str, ...]
    oracle: str
    configs: int
    second_witness: bool


@dataclass(frozen=True, slots=True)
class Other:
    """A class of transformers without a native family.

    result: "equal", its logits over the paged cache are its own; "refused"; or "unbuilt", no tiny
    one could be made, so the start decides. detail: the relative error, or the reason.
    """

    name: str
    result: str
    detail: str


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything, sorted by name. `transformers`: the version that was tried."""

    transformers: str
    natives: tuple[Native, ...]
    others: tuple[Other, ...]

    def how(self, names: list[str]) -> str:
        """ "native", "through transformers" or "no", for the best of a model's class names."""
        if any(name in native.names for native in self.natives for name in names):
            return "native"
        equal = {other.name for other in self.others if other.result == "equal"}
        return "through transformers" if equal & set(names) else "no"

    def with_result(self, result: str) -> list[Other]:
        return [other for other in self.others if other.result == result]


def read() -> Catalog:
    """What the code and the file say."""
    import pagedserve.models.architectures  # noqa: F401  fills the registry

    table = json.loads(FILE.read_text(encoding="utf-8"))
    families = {id(family): family for family in ARCHITECTURES.values()}.values()
    natives = [native(family, table) for family in families]
    others = [
        Other(name, said["result"], said["detail"])
        for name, said in table["fallback"].items()
        if name not in ARCHITECTURES
    ]
    return Catalog(
        table["transformers"],
        tuple(sorted(natives, key=lambda each: each.names[0].lower())),
        tuple(sorted(others, key=lambda each: each.name.lower())),
    )


def native(family: Family, table: dict[str, Any]) -> Native:
    """One family and its tests."""
    tests = [table["native"][name] for name in family.classes if name in table["native"]]
    equal = [table["fallback"].get(name, {}).get("result") == "equal" for name in family.classes]
    return Native(
        family.classes,
        " and ".join(sorted({test["oracle"] for test in tests}, reverse=True)),
        sum(test["configs"] for test in tests),
        any(equal),
    )


def plain(catalog: Catalog) -> dict[str, Any]:
    """The catalogue as builtins, for JSON."""
    return {
        "transformers": catalog.transformers,
        "native": [
            {
                "architectures": list(each.names),
                "tested_against": each.oracle or None,
                "configs": each.configs,
                "equal_through_transformers": each.second_witness,
            }
            for each in catalog.natives
        ],
        "through_transformers": {
            each.name: {"error": each.detail} for each in catalog.with_result("equal")
        },
        "not_tried": {each.name: each.detail for each in catalog.with_result("unbuilt")},
        "refused": {each.name: each.detail for each in catalog.with_result("refused")},
    }


def by_reason(others: list[Other]) -> dict[str, list[str]]:
    """Reason → names, the commonest first."""
    found: dict[str, list[str]] = {}
    for other in others:
        found.setdefault(other.detail, []).append(other.name)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))
