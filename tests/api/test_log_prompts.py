"""What clients write is in the log only where that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.api.serving import Server
from tests.api.toy_engine import DIE, FAIL, RAISE

WORDS = "my knee hurts doctor"
CHAT = "/v1/chat/completions"


def ask(server: Server) -> None:
    """Requests of every end: answered, streamed, refused, failed, killed."""
    post, path = server.http.post, "/v1/completions"
    for body in ({}, {"stream": True}, {"seed": FAIL}, {"seed": DIE}, {"seed": RAISE}):
        post(path, json={"prompt": WORDS, "max_tokens": 4} | body)
    for bad in ({"temperature": WORDS}, {WORDS: 1}, {"stop": [WORDS * 99]}, {"model": WORDS}):
        assert post(path, json={"prompt": WORDS} | bad).status_code in (400, 404)
    post(path, content=json.dumps({"prompt": WORDS})[:-1].encode())
    post(CHAT, json={"messages": [{"role": WORDS, "content": WORDS}]})
    post(CHAT, json={"messages": [{"role": "assistant", "content": WORDS}] * 3})
    post(f"{path}?prompt={WORDS}", json={})
    server.http.get(f"/v1/models/{WORDS}")
    with httpx.Client(
        base_url=server.url, headers={"X-Note": WORDS, "X-Request-Id": WORDS}
    ) as http:
        http.get("/nothing")


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_logged_where_that_is_asked_for(
    checkpoint: Path, tmp_path: Path, wanted: bool
) -> None:
    options = {"model": str(checkpoint), "log_prompts": wanted, "max_engine_restarts": 9}
    with Server(tmp_path / "log", **options) as server:
        server.until_ready()
        ask(server)
        assert ("knee" in server.output) == wanted
        if wanted:
            (line, *_) = [each for each in server.output.splitlines() if "knee" in each]
            assert line.startswith("default asks behind ") and WORDS in line
            assert "max_tokens=4" in line


def test_the_access_log_has_no_text_but_the_path(checkpoint: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "log", model=str(checkpoint), access_log=True) as server:
        server.until_ready().http.post(f"/v1/completions?prompt={WORDS}", json={"prompt": WORDS})
        assert '"POST /v1/completions HTTP/1.1" 200' in server.output
        assert "knee" not in server.output
