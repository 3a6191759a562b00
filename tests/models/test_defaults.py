"""defaults.json says what transformers fills in where a config.json is silent.

python -m tests.models.test_defaults        makes it anew from the installed transformers
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from pagedserve.errors import StartupError
from pagedserve.models import config_json, defaults
from pagedserve.models.architectures import spec_of
from tests.checkpoints import config_of
from tests.models.families import CASES

FAMILIES = sorted({case.family for case in CASES.values()})
DERIVED = {"rope_parameters", "layer_types", "architectures", "model_type"}


class Recorded(dict[str, Any]):
    """Notes which keys were asked for, in a set that its copies share."""

    asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:  # what `{**recorded}` asks for says nothing about reading
        return super().keys()


def read_keys() -> dict[str, set[str]]:
    """model_type → keys that the specs of its cases asked for."""
    found: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for case in CASES.values():
        Recorded.asked = found[case.family]
        spec_of(normalised(config_of(case.family, **case.config)), Recorded)
    return found


def normalised(config: Any) -> dict[str, Any]:
    """As `config_json.read` returns what transformers would have written."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return config_json.complete({**fields, "architectures": [config.architectures[0]]})


def theirs(family: str, keys: set[str]) -> dict[str, Any]:
    """The class's own values of `keys`, before anything is derived from others."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = set(kind().to_dict()) & keys - DERIVED
    found = {key: getattr(kind, key) for key in sorted(known) if plain(getattr(kind, key, ...))}
    theta = getattr(kind, "default_theta", None)
    if isinstance(theta, dict):  # of each kind of layer
        theta = theta["global"]
    if isinstance(theta, float | int) and theta != 10000.0:
        found["default_theta"] = theta
    rope = kind().to_dict().get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        found["rope_parameters"] = rope
    return found


def plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_leaves_out_defaults_is_filled_as_transformers_does(family: str) -> None:
    keys = read_keys()[family]
    assert defaults.known()[family] == theirs(family, keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_says_nothing_is_refused_or_read_as_transformers_does(family: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    written = normalised(CONFIG_MAPPING[family](architectures=classes))
    silent = {"model_type": family, "architectures": classes}
    try:
        spec = spec_of(config_json.complete(silent))
    except StartupError:
        return  # some sizes have no default
    assert spec == spec_of(written)


def main() -> None:
    """Write the file."""
    found = {family: theirs(family, keys) for family, keys in read_keys().items()}
    text = json.dumps(found, indent=1, sort_keys=True)
    defaults.FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
