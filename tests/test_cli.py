"""The command line: flags, exit statuses, one line for an error; over the toy engine."""

from __future__ import annotations

import functools
import io
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedserve.api import server
from pagedserve.cli import interruptible, main
from pagedserve.config import DEMO_MODEL, Config
from pagedserve.engine.client import EngineClient
from pagedserve.llm import LLM
from pagedserve.request import SamplingParams
from pagedserve.version import __version__
from tests.text.building import byte_level, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level()))


@pytest.fixture(autouse=True)
def toy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = functools.partial(EngineClient, "tests.api.toy_engine")
    monkeypatch.setattr("pagedserve.llm.EngineClient", toy)


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Config]]:
    """What `serve` would run."""
    seen: list[Config] = []

    def run(config: Config, say: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(server, "run", run)
    yield seen


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"pagedserve {__version__}\n"


def test_serve_without_arguments_serves_the_demo(configs: list[Config]) -> None:
    assert main(["serve"]) == 0
    assert configs[0].model.model == DEMO_MODEL


def test_flags_are_named_as_vllms(configs: list[Config]) -> None:
    flags = (
        "--host 127.0.0.1 --port 9000 --max-model-len 128 --max-num-seqs 4 --dtype float32 "
        "--max-num-batched-tokens 256 --served-model-name it --api-key k --block-size 32 "
        "--gpu-memory-utilization 0.5 --seed 3 --load-format dummy --no-enable-prefix-caching"
    )
    assert main(["serve", "somewhere", *flags.split()]) == 0
    (config,) = configs
    assert config.model.model == "somewhere"
    assert (config.model.max_model_len, config.model.dtype) == (128, "float32")
    assert (config.model.seed, config.model.load_format) == (3, "dummy")
    assert (config.server.port, config.server.api_key) == (9000, "k")
    assert (config.cache.block_size, config.cache.gpu_memory_utilization) == (32, 0.5)
    assert not config.cache.enable_prefix_caching
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (4, 256)


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["serve", "--nope"], ["serve", "--port", "x"], ["serve", "--dtype", "int3"],
     ["generate"], ["serve", "a", "--model", "b"]],
)  # fmt: skip
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    assert status == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--port", "70000"], "port must be at most 65535"),
        (["serve", "--host", "0.0.0.0"], "--api-key"),
        (["generate", "x", "--model", "/nowhere"], "there is no directory /nowhere"),
        (["generate", "x", "--temperature", "-1"], "temperature must be between"),
        (["serve", "--hf-overrides", "{"], "--hf-overrides is not valid JSON"),
        (["generate", "x", "--override-generation-config", "5"], "must be a JSON object"),
    ],
)
def test_a_failure_is_one_line_and_status_1(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("pagedserve: ") and says in lines[-1]


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for flag in ("--max-model-len", "--max-num-seqs", "--api-key", "--load-format"):
        assert flag in text
    assert "(default: 8000)" in text


def test_generate_streams_to_the_terminal(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "hello", "--model", checkpoint, "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == "hellohello\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))
    assert main(["generate", "-", "--model", checkpoint, "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == "the cat\n"


def test_the_models_own_defaults_stand_between_flags_and_the_terminals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path, byte_level())
    sent: list[SamplingParams] = []
    stream = LLM.stream

    def note(llm: LLM, prompt: Any, params: SamplingParams, **options: Any) -> Any:
        sent.append(params)
        return stream(llm, prompt, params, **options)

    monkeypatch.setattr(LLM, "stream", note)
    generate = ["generate", "hello", "--model", str(directory)]
    assert main(generate) == 0
    (directory / "generation_config.json").write_text('{"temperature": 0.7, "max_new_tokens": 3}')
    capsys.readouterr()
    assert main(generate) == 0
    assert "sampling defaults: temperature 0.7, max_tokens 3 (gen" in capsys.readouterr().err
    assert main([*generate, "--temperature", "0.2", "--top-k", "4"]) == 0
    assert [(each.temperature, each.max_tokens, each.top_k) for each in sent] == [
        (0.0, 256, 0), (0.7, 3, 0), (0.2, 3, 4)
    ]  # fmt: skip


def test_chat_remembers_what_was_said(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello", "", "x" * 5000, "and now?"])

    def ask(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    said: list[list[str]] = []
    chat_prompt = LLM.chat_prompt

    def remember(llm: LLM, messages: Any) -> list[int]:
        said.append([message["content"][:20] for message in messages])
        return chat_prompt(llm, messages)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(LLM, "chat_prompt", remember)
    arguments = ["chat", "--model", checkpoint, "--system", "be kind", "--max-tokens", "10"]
    assert main(arguments) == 0
    answer = "[system]be"  # the toy writes its prompt back, <s> and all
    assert said == [
        ["be kind", "hello"],
        ["be kind", "hello", answer, "x" * 20],  # too long, told so, and forgotten
        ["be kind", "hello", answer, "and now?"],
    ]
    out = capsys.readouterr().out
    assert out.count(answer) == 2
    assert "pagedserve: This model's maximum context length" in out


def test_ctrl_c_only_marks_an_answer() -> None:
    with interruptible() as seen:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.01)
        assert seen == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(1)


def test_the_module_runs() -> None:
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-m", "pagedserve", "version"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout == f"pagedserve {__version__}\n"
