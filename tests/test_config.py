"""Configuration: one field, one flag, one keyword; bad values are named."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pagedserve.config import (
    DEMO_MODEL,
    Config,
    add_flags,
    api_key_from_environment,
    each_option,
    environment_without_keys,
    triton_cache_directory,
)
from pagedserve.errors import StartupError


def parse(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return Config.from_options(vars(parser.parse_args(arguments)))


def test_no_flags_give_the_defaults() -> None:
    assert parse() == Config() == Config.from_options({})
    assert Config().model.model == DEMO_MODEL


def test_every_option_has_a_flag_and_help() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for _, option in each_option():
        assert "--" + option.name.replace("_", "-") in text
        assert option.metadata["help"]


def test_flags_arrive_with_their_types() -> None:
    config = parse(
        "--max-model-len", "64", "--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching",
        "--async-scheduling", "--api-key", "k",
    )  # fmt: skip
    assert config.model.max_model_len == 64
    assert config.cache.gpu_memory_utilization == 0.5
    assert config.cache.enable_prefix_caching is False
    assert config.scheduler.async_scheduling is True
    assert config.server.api_key == "k"


def test_flat_options_survive_the_way_to_the_engine() -> None:
    config = parse("--block-size", "32", "--seed", "5")
    assert Config.from_options(config.to_builtins()) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nothing": 1}, "there is no option 'nothing'"),
        ({"dtype": "int3"}, "dtype must be one of auto, float32"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"gpu_memory_utilization": 1.5}, "at most 1"),
        ({"gpu_memory_utilization": float("nan")}, "at least"),
        ({"port": 65536}, "at most 65535"),
        ({"port": -1}, "at least 0"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(StartupError, match=says):
        Config.from_options(options)


def test_objects_come_as_json_or_as_they_are() -> None:
    config = parse("--hf-overrides", '{"a": {"b": [1, null]}}')
    assert config.model.hf_overrides == {"a": {"b": [1, None]}}
    assert Config.from_options({"hf_overrides": {"a": 1}}).model.hf_overrides == {"a": 1}
    assert Config.from_options(config.to_builtins()) == config
    for name in ("hf_overrides", "override_generation_config"):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(StartupError, match=f"{flag} is not valid JSON: Expecting"):
            parse(flag, "{'a': 1}")
        for given in ("[1]", "5", '"x"'):
            with pytest.raises(StartupError, match=f"{flag} must be a JSON object"):
                parse(flag, given)
        with pytest.raises(StartupError, match=f"{flag} must be a JSON object"):
            Config.from_options({name: 5})


def test_a_flag_that_may_be_given_again_gathers_its_values() -> None:
    assert parse().server.allowed_host == ()
    config = parse("--allowed-host", "a", "--allowed-origin", "https://a", "--allowed-host", "b")
    assert config.server.allowed_host == ("a", "b")
    assert config.server.allowed_origin == ("https://a",)
    # The way to the engine makes lists of tuples.
    crossed = msgspec.msgpack.decode(msgspec.msgpack.encode(config.to_builtins()))
    assert Config.from_options(crossed) == config
    for given in ("a", [1], {"a": 1}):
        with pytest.raises(StartupError, match="allowed_host must be a list of texts"):
            Config.from_options({"allowed_host": given})


def test_children_inherit_all_but_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDSERVE_API_KEY", "k")
    monkeypatch.setenv("PAGEDSERVE_CACHE_DIR", "d")
    found = environment_without_keys()
    assert "k" not in found.values() and found["PAGEDSERVE_CACHE_DIR"] == "d"


def test_groups_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.model = "x"  # type: ignore[misc]


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDSERVE_API_KEY", "")
    assert api_key_from_environment() is None
    monkeypatch.setenv("PAGEDSERVE_API_KEY", "k")
    assert api_key_from_environment() == "k"


def test_compiled_kernels_are_kept_with_ours_unless_triton_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PAGEDSERVE_CACHE_DIR", "/somewhere")
    assert triton_cache_directory() == Path("/somewhere/triton")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "/elsewhere")
            assert triton_cache_directory() is None
