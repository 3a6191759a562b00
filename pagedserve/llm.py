"""The offline engine: prompts in, finished texts out, no server. Names and shapes are vLLM's.

    from pagedserve import LLM, SamplingParams

    with LLM() as llm:
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

It is the same engine process and the same text path as the server's; this process imports no torch.
An engine that dies is not restarted: the call raises UnavailableError with the cause.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pagedserve.api import checkpoint
from pagedserve.config import Config
from pagedserve.engine.channel import Finish, Progress, Ready
from pagedserve.engine.client import EngineClient
from pagedserve.errors import PagedServeError, RequestError, StartupError
from pagedserve.models.telling import Tell, tell_nobody
from pagedserve.request import (
    Request,
    SamplingParams,
    check_prompt,
    check_vocabulary,
    choice_seed,
    plain_token_ids,
)
from pagedserve.step import TokenLogprobs
from pagedserve.text.chat import NO_TEMPLATE, ChatTemplate, check_messages
from pagedserve.text.deltas import Delta, TextStream
from pagedserve.text.outputs import PositionTable, RequestOutput, completion, tables
from pagedserve.text.tokenizer import Tokenizer

log = logging.getLogger("pagedserve")

Prompt = str | Mapping[str, Any]
TELL_SECONDS = 5.0  # between two lines of a download
POLL_SECONDS = 0.1  # how soon an interrupted `stream` notices


class Collector:
    """The engine client's sink of one sequence: its Deltas, its prompt's figures, its error."""

    def __init__(self, stream: TextStream, abort: Callable[[], None]):
        self.stream = stream
        self.deltas: list[Delta] = []
        self.prompt_entries: list[TokenLogprobs] = []
        self.error: PagedServeError | None = None
        self._abort = abort

    @property
    def ended(self) -> bool:
        """True when nothing follows."""
        return self.stream.finish_reason is not None or self.error is not None

    def started(self, cached_tokens: int) -> None:
        pass

    def prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        self.prompt_entries += entries

    def token(self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None) -> None:
        reason, stop_token = (finish.reason, finish.stop_token) if finish else (None, None)
        delta = self.stream.push(token_id, logprobs, reason, stop_token)
        self.deltas.append(delta)
        if delta.finish_reason is not None and finish is None:
            self._abort()  # a stop string: the engine does not know yet

    def failed(self, error: PagedServeError) -> None:
        self.error = error


@dataclass(slots=True)
class Pending:
    """A prompt that the engine works on."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    ids: list[int]
    sinks: list[Collector]


class LLM:
    """An engine process with a model, used from one thread of the process that made it.

    `options` are the server's, by keyword: `LLM("dir", dtype="float32", max_model_len=2048)`.
    `generation` is what the model's makers advise (`generation_config.json`), `notes` are lines on
    it for people.
    Raises StartupError with the cause when the model cannot be served.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        on_progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ):
        if model is not None:
            options["model"] = str(model)
        self.config = Config.from_options(options)
        self._counter = itertools.count()
        self._template: ChatTemplate | None = None
        self._tokenizer: Tokenizer | None = None
        self._client = EngineClient()
        self._downloading: Tell = tell_nobody
        # For scripts that just end: no process may stay behind. In a fork, where this runs as
        # well, `close` leaves the engine alone.
        weakref.finalize(self, self._client.close, 0.1)
        self._quiet = on_progress is None  # nobody shows `notes`
        if on_progress is not None:
            self._client.on_progress = reporter(on_progress)
            self._downloading = now_and_then(on_progress)
        try:
            self._load()
        except BaseException:
            self.shutdown()
            raise

    def _load(self) -> None:
        text = checkpoint.load(self.config.model, self._downloading)
        self._client.configure(self.config.to_builtins() | text.engine_options())
        self._tokenizer, self._template = text.tokenizer, text.template
        self.generation, self.notes = text.generation, text.lines()
        if self._quiet and (unapplied := self.generation.unapplied()):
            log.warning("%s", unapplied)
        while self._client.ready is None:
            self._client.poll(None)
            if self._client.cause_of_death is not None:
                raise StartupError(self._client.cause_of_death)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Stop the engine process. Idempotent."""
        # While it loads, the engine reads no orders: waiting for it would be in vain.
        self._client.close(5.0 if self._client.ready else 0.1)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prompt beginnings; what runs keeps its blocks."""
        self._client.control("reset_prefix_cache")

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises RequestError when it was left out (`skip_tokenizer_init`)."""
        if self._tokenizer is None:
            raise RequestError("there is no tokenizer: skip_tokenizer_init is set")
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """The longest sequence in tokens, prompt and answer together."""
        assert self._client.ready is not None
        return self._client.ready.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses where none are given, cut to what fits behind each prompt."""
        return self.generation.sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        A prompt is a string, `{"prompt": text}` or `{"prompt_token_ids": ids}`, with the integers
        of any library. `use_tqdm` writes one line to standard error with the time and the tokens a
        second. Raises RequestError before anything runs if a prompt or its parameters cannot be
        served, UnavailableError in a fork, and the first error of a request that failed on the way.
        """
        self._client.check_available()
        several = as_prompts(prompts)
        wanted = per_prompt(sampling_params, len(several))
        work = [
            self._pending(*self._read_prompt(prompt), params)
            for prompt, params in zip(several, wanted, strict=True)
        ]
        start = time.monotonic()
        self._run(work)
        outputs = [self._output(pending) for pending in work]
        if use_tqdm:
            report_speed(outputs, time.monotonic() - start)
        return outputs

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several."""
        several = isinstance(messages, (list, tuple)) and messages
        one = not several or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [{"prompt_token_ids": self.chat_prompt(each)} for each in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids that the chat template makes of `messages`."""
        checked = check_messages(messages)
        if self._template is None:
            raise RequestError(NO_TEMPLATE, param="messages")
        return self.get_tokenizer().encode(self._template.render(checked), False)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Delta]:
        """Complete one prompt, Delta by Delta. Ends early, and aborts, once `interrupted()`."""
        self._client.check_available()
        (params,) = per_prompt(sampling_params, 1)
        if params is not None and params.n != 1:
            raise RequestError("stream writes one completion; n must be 1", param="n")
        work = self._pending(*self._read_prompt(prompt), params)
        (sink,) = work.sinks
        self._submit([work])
        try:
            while not interrupted():
                deltas, sink.deltas = sink.deltas, []
                yield from deltas
                if sink.error is not None:
                    raise sink.error
                if sink.ended and not sink.deltas:
                    return
                self._client.poll(POLL_SECONDS)
        finally:
            self._client.abort(work.ids)

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            ids = plain_token_ids("prompt_token_ids", prompt["prompt_token_ids"])
            return prompt.get("prompt"), ids
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if not isinstance(text, str):
            raise RequestError("a prompt is a string, or has prompt_token_ids", param="prompt")
        return text, self.get_tokenizer().encode(text)

    def _usual_params(self, num_prompt: int) -> SamplingParams:
        """The default parameters, with no more tokens than fit behind a prompt."""
        usual = self.get_default_sampling_params()
        room = max(self.max_model_len - num_prompt, 1)
        return self.generation.sampling_params(max_tokens=min(usual.max_tokens or room, room))

    def _pending(self, text: str | None, ids: list[int], params: SamplingParams | None) -> Pending:
        ready = self._client.ready
        assert ready is not None
        params = self._usual_params(len(ids)) if params is None else params
        if params.stop and (self._tokenizer is None or not params.detokenize):
            raise RequestError("stop strings need a tokenizer and detokenize", param="stop")
        check_vocabulary(params, ready.vocab_size)
        params = check_prompt(
            ids, params, vocab_size=ready.vocab_size, max_model_len=ready.max_model_len
        )
        own = [self._client.next_id() for _ in range(params.n)]
        abort = self._client.abort
        sinks = [
            Collector(TextStream(self._tokenizer, params, ids), functools.partial(abort, [id]))
            for id in own
        ]
        return Pending(text, ids, params, own, sinks)

    def _submit(self, work: list[Pending]) -> None:
        now = time.monotonic()
        requests, sinks = [], []
        for pending in work:
            given = pending.params.seed
            for index, id in enumerate(pending.ids):
                # Without a seed of its own a request draws from the engine's, so that a script
                # gives the same outputs each time it runs.
                seed = choice_seed(self.config.model.seed, id)
                if given is not None:
                    seed = choice_seed(given, index)
                requests.append(Request(id, pending.token_ids, pending.params, seed, 0, now))
            sinks += pending.sinks
        self._client.submit(requests, sinks)

    def _run(self, work: list[Pending]) -> None:
        sinks = [sink for pending in work for sink in pending.sinks]
        self._submit(work)
        try:
            while sinks:
                self._client.poll(None)
                for sink in sinks:
                    if sink.error is not None:
                        raise sink.error
                sinks = [sink for sink in sinks if not sink.ended]
        finally:
            self._client.abort([id for pending in work for id in pending.ids])

    def _output(self, pending: Pending) -> RequestOutput:
        ids, params = pending.token_ids, pending.params
        prompt_logprobs: list[PositionTable | None] | None = None
        if params.prompt_logprobs is not None:
            entries = pending.sinks[0].prompt_entries
            prompt_logprobs = [None, *tables(ids[1:], entries, self._tokenizer)]
        return RequestOutput(
            request_id=str(next(self._counter)),
            prompt=pending.prompt,
            prompt_token_ids=ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[
                completion(index, sink.deltas, params, self._tokenizer)
                for index, sink in enumerate(pending.sinks)
            ],
        )


def as_prompts(given: Any) -> list[Any]:
    """One prompt as a list of one, several as a list. Raises RequestError for what is neither."""
    if isinstance(given, (str, Mapping)):
        return [given]
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise RequestError(
            f"prompts are a prompt or a list of them, got {type(given).__name__}", param="prompt"
        )
    return list(given)


def per_prompt(params: Any, num_prompts: int) -> list[SamplingParams] | list[None]:
    """One set of parameters for each prompt, of a SamplingParams or a sequence of them.

    None, for all prompts, is the default.
    """
    if params is None:
        return [None] * num_prompts
    if not isinstance(params, (list, tuple)):
        return [checked_params(params)] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"there are {len(params)} sampling_params for {num_prompts} prompts",
            param="sampling_params",
        )
    return [checked_params(each) for each in params]


def checked_params(params: Any) -> SamplingParams:
    """`params`. Raises RequestError for what is no SamplingParams."""
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"sampling_params must be SamplingParams, got {type(params).__name__}",
            param="sampling_params",
        )
    return params


def now_and_then(say: Callable[[str, float], None]) -> Tell:
    """Hands on how far a download is, every few seconds, with the seconds since now."""
    begun, told = time.monotonic(), float("-inf")

    def report(phase: str, detail: str, done: int = 0, total: int = 0) -> None:
        nonlocal told
        now = time.monotonic()
        if now >= told + TELL_SECONDS:
            told = now
            say(f"{phase} {detail}", now - begun)

    return report


def reporter(say: Callable[[str, float], None]) -> Callable[[Progress | Ready], None]:
    """Hands each start-up phase on, once, as (phase, seconds since the engine process started)."""
    begun: set[str] = set()

    def report(message: Progress | Ready) -> None:
        phase = message.phase if isinstance(message, Progress) else "ready"
        if phase not in begun:
            begun.add(phase)
            say(phase, message.seconds)

    return report


def report_speed(outputs: list[RequestOutput], seconds: float) -> None:
    """One line about a finished `generate`."""
    import sys

    tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    print(
        f"{len(outputs)} prompts, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tok/s",
        file=sys.stderr,
    )
