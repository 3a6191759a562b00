"""What JSON is built of, counted without a parser: compared with one."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pagedserve.api import json_shape
from pagedserve.api.json_shape import check_shape
from pagedserve.errors import RequestError
from pagedserve.limits import Limits


def tree(r: random.Random, depth: int) -> Any:
    """A random JSON value, with strings that look like structure."""
    kind = r.random()
    if depth == 0 or kind < 0.3:
        return r.choice(
            [1, None, True, "".join(r.choices('[]{}",\\\n:aü\u2028', k=r.randrange(9)))]
        )
    if kind < 0.6:
        return {f"{n}{r.choice('[{}]')}": tree(r, depth - 1) for n in range(r.randrange(4))}
    return [tree(r, depth - 1) for _ in range(r.randrange(4))]


def depth_of(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0)


def containers_of(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + sum(map(containers_of, value.values() if isinstance(value, dict) else value))


def code_of(body: bytes, **limits: int) -> str | None:
    try:
        check_shape(body, Limits.of(limits))
    except RequestError as error:
        assert error.status == 400
        return error.code
    return None


@pytest.mark.parametrize("piece_bytes", [1, 7, 256 << 10])
def test_depth_and_number_are_those_that_a_parser_finds(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_shape, "PIECE_BYTES", piece_bytes)
    r, seen = random.Random(), set()
    for _ in range(400):
        value = tree(r, r.randrange(8))
        body = json.dumps(value, ensure_ascii=r.random() < 0.5, indent=r.choice([None, 1])).encode()
        depth, number = depth_of(value), containers_of(value)
        seen.add(depth)
        if depth:
            assert code_of(body, json_depth=depth) is None
            assert code_of(body, json_containers=number) is None
        if depth > 1:
            assert code_of(body, json_depth=depth - 1) == "json_too_deep"
            assert code_of(body, json_containers=number - 1) == "json_too_large"
    assert len(seen) > 4


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
def test_a_level_too_many_is_named(opening: str) -> None:
    levels = opening.count("[") + opening.count("{")
    closing = "".join({"[": "]", "{": "}"}[c] for c in reversed(opening) if c in "[{")
    for times, code in ((64 // levels, None), (64 // levels + 1, "json_too_deep")):
        assert code_of((opening * times + "1" + closing * times).encode()) == code


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"]" * 500, b'"' + b"[" * 500, b'"\\' + b"[" * 500, b"[}" * 50, b"\\" * 500,
     b'["\\"[[[" , "\\\\"]' * 100],
)  # fmt: skip
def test_what_is_no_json_is_left_to_the_parser(body: bytes) -> None:
    check_shape(body, Limits())


def test_structure_that_is_only_text_counts_for_nothing() -> None:
    text = "[{" * 200_000 + '\\"' * 1000
    check_shape(json.dumps({"prompt": text}).encode(), Limits())
