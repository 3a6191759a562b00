"""What clients are told of trouble: no path, no memory address, no exception of somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagedserve.api.openai_shapes import error_response
from pagedserve.api.sse import error_event
from pagedserve.errors import (
    PagedServeError,
    RequestError,
    StartupError,
    UnavailableError,
    without_places,
)
from pagedserve.text.chat import ChatTemplate
from tests.api.serving import Server
from tests.api.test_bad_input import BAD, CHAT, TEXT
from tests.api.toy_engine import RAISE

CAUSE = "OSError: [Errno 5] '/home/me/my-models/llama/model.safetensors' at 0x7f12ab34cd56"
JSON = {"Content-Type": "application/json"}
TOLD = "OSError: [Errno 5] '…/model.safetensors' at 0x…"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (CAUSE, TOLD),
        ("~/a/b.so: no", "…/b.so: no"),
        ("/etc/passwd", "…/passwd"),
        ("C:\\Users\\me\\x.bin is bad", "…/x.bin is bad"),
        ("<object at 0x55d0c0ffee>", "<object at 0x…>"),
        ("../up/and/../down.py", "../up/and/../down.py"),  # from where nobody knows
        ("org/name: 3/4 of 5 / 6, 0x1f", "org/name: 3/4 of 5 / 6, 0x1f"),
        ("see https://example.com/a/b", "see https://example.com/a/b"),
        ("PosixPath('/a/b/c.json')", "PosixPath('…/c.json')"),
    ],
)
def test_places_are_taken_out_of_a_text(text: str, told: str) -> None:
    assert without_places(text) == told


@pytest.mark.parametrize("kind", [PagedServeError, UnavailableError, StartupError])
def test_an_error_of_ours_says_to_clients_no_place(kind: type[PagedServeError]) -> None:
    error = kind(CAUSE)
    for body in (bytes(error_response(error).body), error_event(error)):
        assert TOLD.encode() in body and b"my-models" not in body and b"0x7f" not in body
    assert error.message == CAUSE  # the operator's terminal says it whole


def test_a_clients_own_error_is_told_as_it_was_written() -> None:
    error = RequestError("stop '/a/b/c' is 0xdeadbeef")
    assert b"'/a/b/c' is 0xdeadbeef" in bytes(error_response(error).body)


def test_no_refusal_quotes_the_prompt(server: Server) -> None:
    words = "my-knee-hurts-doctor"
    for path, wrong, _ in BAD:
        messages = [{"role": "user", "content": words}]
        body = ({"messages": messages} if path == CHAT else {"prompt": words}) | wrong
        answer = server.http.post(path, content=json.dumps(body), headers=JSON)
        assert answer.status_code == 400 and "knee" not in answer.text
    for path, body in (
        (TEXT, {"prompt": words * 5000}),
        (TEXT, {"prompt": [words, 5]}),
        (TEXT, {"prompt": {words: words}}),
        (CHAT, {"messages": words}),
        (CHAT, {"messages": [{"role": words, "content": words}]}),
        (CHAT, {"messages": [{"role": "user", "content": {words: words}}]}),
        (CHAT, {"messages": [{"role": "user", "content": [words]}]}),
    ):
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400 and "knee" not in answer.text, answer.text
    broken = json.dumps({"prompt": words})[:-1]
    assert "knee" not in server.http.post(TEXT, content=broken, headers=JSON).text


def test_an_exception_that_nobody_foresaw_is_not_quoted() -> None:
    event = error_event(RuntimeError(CAUSE))
    assert b"OSError" not in event and b"the server failed" in event


def test_what_a_template_says_has_no_address() -> None:
    source = "{{ raise_exception('bad ' ~ messages.items ~ ' in /srv/models/x/template.jinja') }}"
    with pytest.raises(RequestError) as refused:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    message = refused.value.message
    assert "template.jinja" in message and "/srv" not in message and "0x7" not in message


def test_a_death_is_told_to_keys_without_places_and_to_others_not_at_all(
    checkpoint: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_engine_restarts": 0, "api_key": "k"}
    with Server(tmp_path / "log", model=str(checkpoint), **options) as server:
        server.until_ready()
        server.http.headers["Authorization"] = "Bearer k"
        body = {"prompt": "hello", "seed": RAISE, "max_tokens": 9, "stream": True}
        failed = server.http.post("/v1/completions", json=body).text
        while server.http.get("/livez").status_code == 200:
            pass
        known = server.http.get("/health")
        figures = server.http.get("/metrics").text
        refused = server.http.post("/v1/completions", json={"prompt": "hi"})
        del server.http.headers["Authorization"]
        stranger = server.http.get("/health")
        for text in (failed, known.text, figures, refused.text):
            assert "…/weights.bin" in text and "0x…" in text
            assert "/very" not in text and "0x7f" not in text
        assert stranger.status_code == 503
        assert stranger.json() == {"status": "unavailable", "phase": "dead"}
        assert server.exit_status() == 1
        assert "/very/secret/weights.bin" in server.output
