"""The offline `LLM` over the toy engine, which writes prompts back; vLLM's names and shapes."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pagedserve
from pagedserve import LLM, SamplingParams
from pagedserve.engine.client import EngineClient
from pagedserve.errors import ContextLengthExceeded, PagedServeError, RequestError, StartupError
from tests.text.building import byte_level, write_checkpoint

FAIL, SLOW, DIE = 6662, 6663, 6661


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level()))


@pytest.fixture(scope="module", autouse=True)
def toy_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        toy = functools.partial(EngineClient, "tests.api.toy_engine")
        patch.setattr("pagedserve.llm.EngineClient", toy)
        yield


@pytest.fixture(scope="module")
def llm(checkpoint: str) -> Iterator[LLM]:
    with LLM(checkpoint) as made:
        yield made


def test_a_vllm_script_ports_by_its_import_line(llm: LLM) -> None:
    outputs = llm.generate(
        ["hello world", {"prompt": "the cat"}, {"prompt_token_ids": [104, 105]}],
        SamplingParams(temperature=0.8, top_p=0.95, max_tokens=4, n=2),
    )
    assert [output.prompt for output in outputs] == ["hello world", "the cat", None]
    assert outputs[0].prompt_token_ids == llm.get_tokenizer().encode("hello world")
    assert len({output.request_id for output in outputs}) == 3
    for output in outputs:
        assert output.finished
        assert [completion.index for completion in output.outputs] == [0, 1]
        for completion in output.outputs:
            assert len(completion.token_ids) == 4
            assert (completion.finish_reason, completion.stop_reason) == ("length", None)
            assert completion.logprobs is None and completion.cumulative_logprob is None
    assert outputs[0].outputs[0].text == "hello world"


def test_one_prompt_gives_a_list_of_one(llm: LLM) -> None:
    (output,) = llm.generate("hello")
    assert len(output.outputs[0].token_ids) == 16


def test_each_prompt_can_have_its_own_parameters(llm: LLM) -> None:
    both = llm.generate(["hello"] * 2, [SamplingParams(max_tokens=n) for n in (1, 3)])
    assert [len(output.outputs[0].token_ids) for output in both] == [1, 3]
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate(["x"], [SamplingParams()] * 2)


def test_logprobs_are_tables_by_token_id(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("hello", params)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    for id, table in zip(completion.token_ids, completion.logprobs, strict=True):
        assert (table[id].logprob, table[id].rank) == (-0.5, 1)
        assert table[id].decoded_token == llm.get_tokenizer().token_string(id)
        assert len(table) == 2
    assert completion.cumulative_logprob == -1.5
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [list(table or ()) for table in output.prompt_logprobs[1:]] == [
        [id] for id in output.prompt_token_ids[1:]
    ]


def test_stop_strings_end_the_text(llm: LLM) -> None:
    (output,) = llm.generate("hello world", SamplingParams(max_tokens=50, stop=["world"]))
    assert output.outputs[0].text == "hello "
    assert output.outputs[0].stop_reason == "world"


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (one,) = llm.chat(messages, SamplingParams(max_tokens=30))
    assert one.outputs[0].text.startswith("[user]hello\n[assistant]")
    assert len(llm.chat([messages, messages], SamplingParams(max_tokens=2))) == 2


def test_stream_gives_the_pieces_of_generate(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    deltas = list(llm.stream("hello 日本 😀", params))
    (output,) = llm.generate("hello 日本 😀", params)
    assert "".join(delta.text for delta in deltas) == output.outputs[0].text
    assert deltas[-1].finish_reason == "length"


def test_a_stream_left_early_is_aborted(llm: LLM) -> None:
    stream = llm.stream("hello", SamplingParams(max_tokens=2000, seed=SLOW))
    next(stream)
    stream.close()
    assert llm._client.num_live == 0
    seen: list[Any] = []
    for delta in llm.stream(
        "hello", SamplingParams(max_tokens=2000, seed=SLOW), interrupted=lambda: len(seen) > 2
    ):
        seen.append(delta)
    assert 2 < len(seen) < 10
    assert llm._client.num_live == 0


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("", {}, None),  # the tokenizer adds <s>
        ({"prompt_token_ids": []}, {}, RequestError),
        ({"prompt_token_ids": [10**6]}, {}, RequestError),
        ({"prompt_token_ids": [5] * 3000}, {}, ContextLengthExceeded),
        ("hi", {"max_tokens": 5000}, ContextLengthExceeded),
        ("hi", {"stop_token_ids": [10**6]}, RequestError),
        ("hi", {"seed": FAIL}, PagedServeError),
        (5, {}, RequestError),
    ],
)
def test_a_bad_prompt_is_refused_and_the_engine_goes_on(
    prompt: Any, params: Any, error: type[Exception] | None, llm: LLM
) -> None:
    if error is None:
        assert llm.generate(prompt, SamplingParams(**params))
    else:
        with pytest.raises(error):
            llm.generate(["good", prompt], SamplingParams(**params))
    assert llm.generate("hello", SamplingParams(max_tokens=1))
    assert llm._client.num_live == 0


def test_without_a_tokenizer_there_are_token_ids(checkpoint: str) -> None:
    with LLM(model=checkpoint, skip_tokenizer_init=True) as llm:
        (output,) = llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=3))
        assert output.outputs[0].token_ids == [5, 6, 5]
        assert output.outputs[0].text == ""
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            llm.generate("hello")
        with pytest.raises(RequestError, match="stop"):
            llm.generate({"prompt_token_ids": [5]}, SamplingParams(stop=["x"]))


def test_unseeded_requests_repeat_from_run_to_run(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeds() -> list[int]:
        with LLM(checkpoint, seed=3) as llm:
            sent: list[Any] = []
            submit = llm._client.submit
            monkeypatch.setattr(llm._client, "submit", lambda r, s: (sent.extend(r), submit(r, s)))
            llm.generate(["a", "b"], SamplingParams(n=2, max_tokens=1))
            llm.generate("a", SamplingParams(n=2, max_tokens=1, seed=7))
            return [request.seed for request in sent]

    first, second = seeds(), seeds()
    assert first == second
    assert len(set(first)) == 6
    assert first[4] == 7


def test_a_start_that_fails_raises_the_cause(checkpoint: str) -> None:
    with pytest.raises(StartupError, match="a toy cannot hold dummy weights"):
        LLM(checkpoint, load_format="dummy")
    with pytest.raises(StartupError, match="there is no directory /nowhere"):
        LLM("/nowhere")
    with pytest.raises(StartupError, match="there is no option 'dtyp'"):
        LLM(checkpoint, dtyp="float32")


def test_a_dead_engine_raises_its_cause_at_once_and_later(checkpoint: str) -> None:
    with LLM(checkpoint) as llm:
        with pytest.raises(PagedServeError, match="exited with status 3"):
            llm.generate("hi", SamplingParams(seed=DIE))
        with pytest.raises(PagedServeError, match="exited with status 3"):
            llm.generate("hi")


def test_shutdown_ends_the_engine_process(checkpoint: str) -> None:
    llm = LLM(checkpoint)
    pid = llm._client.pid
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)


def test_an_llm_that_is_just_dropped_leaves_no_process(checkpoint: str) -> None:
    llm = LLM(checkpoint)
    pid = llm._client.pid
    del llm
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)


def test_progress_is_told_phase_by_phase(checkpoint: str) -> None:
    phases: list[str] = []
    LLM(checkpoint, on_progress=lambda phase, seconds: phases.append(phase)).shutdown()
    assert phases == ["toy phase", "ready"]


def test_use_tqdm_writes_one_line(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["hello"] * 2, SamplingParams(max_tokens=2), use_tqdm=True)
    assert capsys.readouterr().err.startswith("2 prompts, 4 tokens in ")


def test_importing_the_package_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, pagedserve; print(pagedserve.__version__, *sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith(pagedserve.__version__)
    assert not {"torch", "msgspec", "fastapi", "tokenizers"} & set(run.stdout.split())
    with pytest.raises(AttributeError):
        pagedserve.nothing  # noqa: B018


def test_a_checkpoint_path_may_be_a_path(checkpoint: str) -> None:
    with LLM(Path(checkpoint)) as llm:
        assert llm.generate("hi", SamplingParams(max_tokens=1))
