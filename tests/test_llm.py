"""The offline `LLM` over the toy engine, which writes prompts back; vLLM's names and shapes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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


def test_parameters_left_out_are_the_models_own_as_far_as_they_fit(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, byte_level())
    values = '{"temperature": 0.25, "top_p": 0.5, "max_new_tokens": 20, "eos_token_id": 7}'
    (directory / "generation_config.json").write_text(values)
    with LLM(directory, max_model_len=30) as llm:
        usual = llm.get_default_sampling_params()
        assert usual == SamplingParams(temperature=0.25, top_p=0.5, max_tokens=20)
        assert llm.generation.end_token_ids == [7, byte_level().token_to_id("</s>")]
        short, long = llm.generate([{"prompt_token_ids": [5] * n} for n in (4, 25)])
        assert len(short.outputs[0].token_ids) == 20
        assert len(long.outputs[0].token_ids) == 5
        assert len(list(llm.stream({"prompt_token_ids": [5] * 25}))) == 5
        with pytest.raises(ContextLengthExceeded):
            llm.generate({"prompt_token_ids": [5] * 25}, usual)
    with LLM(directory, generation_config="none", max_model_len=30) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_the_models_stop_strings_and_least_of_tokens_are_its_defaults(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, byte_level())
    values = '{"stop_strings": ["lo"], "min_new_tokens": 12, "max_new_tokens": 90}'
    (directory / "generation_config.json").write_text(values)
    with LLM(directory, max_model_len=30) as llm:
        usual = SamplingParams(stop=["lo"], min_tokens=12, max_tokens=90)
        assert llm.get_default_sampling_params() == usual
        ids = llm.get_tokenizer().encode("hello")
        (output,) = llm.generate({"prompt_token_ids": ids})
        assert output.outputs[0].stop_reason == "lo" and len(output.outputs[0].token_ids) > 12
        (output,) = llm.generate({"prompt_token_ids": [5] * 22})  # a least that does not fit
        assert len(output.outputs[0].token_ids) == 8
    with LLM(directory, skip_tokenizer_init=True, max_model_len=99) as llm:
        assert llm.get_default_sampling_params().stop == []
        assert any("not applied" in line and "stop_strings" in line for line in llm.notes)
        (output,) = llm.generate({"prompt_token_ids": [5] * 4})
        assert len(output.outputs[0].token_ids) == 90


def test_what_is_not_applied_is_a_warning_unless_the_caller_shows_notes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_checkpoint(tmp_path, byte_level())
    (directory / "generation_config.json").write_text('{"num_beams": 4}')
    line = "not applied from generation_config.json: num_beams 4"
    with LLM(directory) as llm:
        assert (caplog.messages, llm.notes) == ([line], [line])
    caplog.clear()
    with LLM(directory, on_progress=lambda phase, seconds: None) as llm:
        assert (caplog.messages, llm.notes) == ([], [line])


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
        ("\ud800", {}, RequestError),
        ({}, {}, RequestError),
        ({"prompt": None}, {}, RequestError),
        ({"prompt_token_ids": [1.5]}, {}, RequestError),
        ({"prompt_token_ids": [True]}, {}, RequestError),
        ({"prompt_token_ids": [None]}, {}, RequestError),
        ({"prompt_token_ids": "12"}, {}, RequestError),
        ({"prompt_token_ids": None}, {}, RequestError),
        ({"prompt_token_ids": np.array([5, 6])}, {}, None),
        ({"prompt_token_ids": [np.int64(5)]}, {"temperature": np.float64(0.5)}, None),
        ("hi", {"ignore_eos": 1}, RequestError),
        ("hi", {"detokenize": None}, RequestError),
        ("hi", {"stop": ["\ud800"]}, RequestError),
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


@pytest.mark.parametrize("params", [{"temperature": 0}, [None], "x", 5, [{"n": 1}]])
def test_sampling_params_of_another_type_are_refused_by_name(params: Any, llm: LLM) -> None:
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams") as caught:
        llm.generate(["hello"], params)
    assert caught.value.param == "sampling_params"
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams"):
        next(llm.stream("hello", params))


def test_no_sampling_params_for_two_prompts_are_too_few(llm: LLM) -> None:
    with pytest.raises(RequestError, match="0 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [])
    assert llm.generate([], []) == []


@pytest.mark.parametrize("prompts", [5, None, b"hi", [b"hi"], [None], [[1, 2]]])
def test_what_is_no_prompt_is_refused(prompts: Any, llm: LLM) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("messages", [5, "hi", {"role": "user"}, [], ["hi"], [None]])
def test_what_is_no_conversation_is_refused(messages: Any, llm: LLM) -> None:
    with pytest.raises(RequestError, match="messages"):
        llm.chat(messages)


def test_a_request_that_cannot_be_sent_leaves_no_sink(llm: LLM) -> None:
    params = SamplingParams(stop=["x"])
    params.stop[0] = "\ud800"  # behind the checks' back
    with pytest.raises(UnicodeEncodeError):
        llm.generate("hello", params)
    assert llm._client.num_live == 0
    assert llm.generate("hello", SamplingParams(max_tokens=1))


FORKING = """
import functools, os, sys
from pagedserve import LLM, SamplingParams, llm as room
from pagedserve.engine.client import EngineClient
from pagedserve.errors import UnavailableError

room.EngineClient = functools.partial(EngineClient, "tests.api.toy_engine")
llm = LLM(sys.argv[1])
stream = llm.stream("hello", SamplingParams(max_tokens=8))
next(stream)
child = os.fork()
if child == 0:
    for use in (lambda: llm.generate("hello"), lambda: next(stream), lambda: list(stream)):
        try:
            print("child", use(), flush=True)
        except UnavailableError as error:
            print("refused:", error, flush=True)
    llm.shutdown()
    sys.exit(0)  # every finalizer runs
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("rest", len(list(stream)))
print("again", len(llm.generate("hello", SamplingParams(max_tokens=3))))
"""


def test_a_fork_neither_uses_nor_ends_its_parents_engine(checkpoint: str) -> None:
    """In a process of its own: a fork of the tests would be a second run of them."""
    command = [sys.executable, "-c", FORKING, checkpoint]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert len([line for line in lines if line.startswith("refused: this engine belongs to")]) == 2
    assert lines[-2:] == ["rest 7", "again 1"]


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
    code = "import sys, pagedserve; print(pagedserve.__version__, *sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith(pagedserve.__version__)
    assert not {"torch", "msgspec", "fastapi", "tokenizers"} & set(run.stdout.split())
    with pytest.raises(AttributeError):
        pagedserve.nothing  # noqa: B018


def test_a_checkpoint_path_may_be_a_path(checkpoint: str) -> None:
    with LLM(Path(checkpoint)) as llm:
        assert llm.generate("hi", SamplingParams(max_tokens=1))
