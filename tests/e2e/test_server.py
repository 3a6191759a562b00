"""A live server, the demo model, and the official client: what a user meets."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pagedserve.config import DEMO_MODEL
from tests.e2e.conftest import LiveServer, prompts


def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came true")


def nothing_held(server: LiveServer) -> bool:
    """No request runs or waits and no block is held."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(server.metric(name) == 0 for name in names)


def test_chat_answers_a_sum_and_streams_the_same(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "What is 27 + 45?"}]
    with client(server) as api:
        whole = api.chat.completions.create(
            model="pagedserve-demo", messages=messages, temperature=0
        )
        assert "72" in whole.choices[0].message.content
        assert whole.choices[0].finish_reason == "stop"
        chunks = list(
            api.chat.completions.create(
                model="pagedserve-demo",
                messages=messages,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_completions_of_several_prompts_equal_each_alone(server: LiveServer) -> None:
    asked = prompts()[:6]
    with client(server) as api:
        kwargs = {"model": "pagedserve-demo", "temperature": 0, "max_tokens": 12}
        together = api.completions.create(prompt=asked, **kwargs)
        alone = [api.completions.create(prompt=ids, **kwargs).choices[0].text for ids in asked]
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == alone


def test_seeded_choices_differ_from_each_other_and_repeat(server: LiveServer) -> None:
    with client(server) as api:
        runs = [
            api.completions.create(
                model="pagedserve-demo",
                prompt="Once upon a time",
                n=4,
                seed=11,
                max_tokens=20,
                temperature=1,
            )
            for _ in range(2)
        ]
    texts = [[choice.text for choice in run.choices] for run in runs]
    assert texts[0] == texts[1] and len(set(texts[0])) == 4


def test_the_demo_takes_the_likeliest_token_unless_asked_otherwise(server: LiveServer) -> None:
    """Its generation_config.json says so; requests without a seed draw a fresh one."""

    def write(**params: Any) -> str:
        answer = api.completions.create(
            model="pagedserve-demo", prompt="Once upon a time", max_tokens=20, **params
        )
        return answer.choices[0].text

    with client(server) as api:
        assert write() == write(temperature=0)
        assert len({write(temperature=3) for _ in range(2)}) == 2


def test_many_streams_at_once_each_get_their_own_text(server: LiveServer) -> None:
    def ask(pair: tuple[int, int]) -> str:
        with client(server) as api:
            stream = api.chat.completions.create(
                model="pagedserve-demo",
                messages=[{"role": "user", "content": f"What is {pair[0]} + {pair[1]}?"}],
                temperature=0,
                stream=True,
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    pairs = [(a, 3 * a % 50) for a in range(24)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, pairs))
    assert all(str(a + b) in answer for (a, b), answer in zip(pairs, answers, strict=True))


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_aborts_and_frees_every_block(server: LiveServer, stream: bool) -> None:
    eventually(lambda: nothing_held(server))
    body = {
        "model": "pagedserve-demo",
        "prompt": "Once",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": stream,
        "n": 3,
    }
    with httpx.Client(timeout=1.5) as http:
        if stream:
            with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{server.url}/v1/completions", json=body)
    eventually(lambda: nothing_held(server))


def test_bad_requests_harm_nobody(server: LiveServer) -> None:
    body = {"model": "pagedserve-demo", "prompt": "Once", "max_tokens": 600, "ignore_eos": True}
    bad = [
        {"n": 10**9},
        {"temperature": "hot"},
        {"stop": ["x" * 1000] * 1000},
        {"prompt": [1, 10**9]},
        {"prompt": "hello " * 5000},
        {"logit_bias": {"99999": 1}},
        {"frobnicate": True},
        {"model": "gpt-none"},
    ]
    with httpx.Client(timeout=60) as http, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(http.post, f"{server.url}/v1/completions", json=body)
        for change in bad * 3:
            answer = httpx.post(f"{server.url}/v1/completions", json=body | change)
            assert 400 <= answer.status_code < 500 and len(answer.content) < 4096
            assert answer.json()["error"]["param"] == next(iter(change))
        good = running.result()
    assert good.status_code == 200
    assert good.json()["usage"]["completion_tokens"] == 600


def test_a_killed_engine_ends_streams_in_band_and_the_server_with_a_failure(tmp_path: Path) -> None:
    live = LiveServer(tmp_path / "log", "--max-engine-restarts", "0").ready()
    try:
        check_that_a_death_is_told(live)
    finally:
        live.stop()


def check_that_a_death_is_told(own_server: LiveServer) -> None:
    with client(own_server) as api:
        stream = api.completions.create(
            model="pagedserve-demo",
            prompt="Once",
            max_tokens=1900,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        os.kill(own_server.engine_pid(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="killed by SIGKILL"):
            for _ in stream:
                pass
    status, body = own_server.get("/health")
    assert status == 503 and "SIGKILL" in body
    assert own_server.process.wait(30) == 1
    assert own_server.text().count("SIGKILL") == 1


def test_interrupting_lets_running_requests_finish_and_exits_zero(own_server: LiveServer) -> None:
    body = {
        "model": "pagedserve-demo",
        "prompt": "Once",
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
    }
    with (
        httpx.Client(timeout=60) as http,
        http.stream("POST", f"{own_server.url}/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        own_server.process.send_signal(signal.SIGINT)
        eventually(lambda: "shutting down" in own_server.text())
        assert httpx.get(f"{own_server.url}/readyz").status_code == 503
        refused = httpx.post(f"{own_server.url}/v1/completions", json=body)
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert own_server.process.wait(30) == 0


def test_the_port_answers_with_the_phase_before_the_model_is_loaded(tmp_path) -> None:
    live = LiveServer(tmp_path / "log")
    try:
        status, body = live.get("/readyz")
        assert status == 503 and json.loads(body)
        assert live.get("/livez")[0] == 200
        refused = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and "loading" in refused.json()["error"]["message"]
        live.ready()
        assert live.get("/readyz")[0] == 200
    finally:
        live.stop()


def test_a_model_that_cannot_load_ends_the_server_with_the_reason(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    done = subprocess.run(
        [sys.executable, "-m", "pagedserve", "serve", str(tmp_path), "--port", "0"]
        + ["--tokenizer", DEMO_MODEL],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "NoSuchForCausalLM" in done.stderr and "Traceback" not in done.stderr


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "pagedserve", "serve", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert port in done.stderr and "Traceback" not in done.stderr


def test_generate_writes_to_standard_output() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pagedserve", "generate", "12 + 34 = ", "--max-tokens", "4"]
        + ["--temperature", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "46" in done.stdout
