"""`POST /v1/completions`: prompts in, text out, in one piece or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api.answer import Answer, joined, reading
from pagedserve.api.openai_schema import NEUTRAL_COMPLETION, CompletionBody, read_body
from pagedserve.api.openai_shapes import Head, check_model, json_response, text_token, usage_of
from pagedserve.api.service import Service
from pagedserve.api.sse import Envelope, EventStream, encode
from pagedserve.errors import RequestError
from pagedserve.request import FinishReason, SamplingParams
from pagedserve.text.deltas import Delta, PositionLogprobs
from pagedserve.text.detokenizer import detokenizer
from pagedserve.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 1024
MARK = "\ue000"  # stands for the text while a chunk's unchanging part is rendered


@dataclass
class Job:
    """A completions request, ready for the engine.

    `texts` are the prompts as text, for `echo`. With `scoring` (echo and max_tokens 0) one token is
    computed, because that is what the engine can do, and not shown.
    """

    body: CompletionBody
    head: Head
    prompts: list[list[int]]
    texts: list[str]
    params: list[SamplingParams]
    scoring: bool = False
    logprobs: bool = False
    num_written: dict[int, int] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Choices a prompt."""
        return self.params[0].n


async def create_completion(service: Service, request: HttpRequest) -> Response:
    """The handler."""
    service.check_available()
    body = await read_body(request, CompletionBody, NEUTRAL_COMPLETION)
    check_model(service, body.model)
    job = await prepare(service, body, Head.of(service, request, "cmpl", "text_completion"))
    answer = service.submit(job.prompts, job.params, priority=body.priority or 0)
    if body.stream:
        return EventStream(answer, CompletionEvents(service, job, answer))
    async with reading(answer, request.receive):
        deltas = await answer.collect()
    choices = Choices(service, job, answer)
    return json_response(
        job.head.fields()
        | {
            "choices": [
                choices.whole(index, joined(pieces)) for index, pieces in enumerate(deltas)
            ],
            "usage": choices.usage(),
        }
    )


async def prepare(service: Service, body: CompletionBody, head: Head) -> Job:
    """Tokenise and check the prompts, settle the parameters. Raises RequestError."""
    tokenizer = service.tokenizer
    assert tokenizer is not None
    scoring = bool(body.echo) and body.max_tokens == 0
    params = body.params(
        max_tokens=1 if scoring else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    job = Job(body, head, [], [], [], scoring, body.logprobs is not None)
    prompts = read_prompts(body.prompt)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await service.encode(texts, param="prompt", add_special_tokens=True))
    for prompt in prompts:
        ids = next(encoded) if isinstance(prompt, str) else prompt
        settled = service.check(ids, params, param="prompt")
        if body.max_tokens is None and settled.max_tokens is not None:
            settled = settled.replace(max_tokens=min(settled.max_tokens, DEFAULT_MAX_TOKENS))
        job.prompts.append(ids)
        job.params.append(settled)
        if body.echo:
            job.texts.append(prompt if isinstance(prompt, str) else tokenizer.decode(ids))
    return job


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request: a string, token ids, or a list of either. Raises RequestError."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise bad_prompt()
    if not prompt:
        raise RequestError("prompt is empty; give at least one token", param="prompt")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} are allowed",
            param="prompt",
        )
    if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in prompt)):
        return prompt
    raise bad_prompt()


def bad_prompt() -> RequestError:
    """The error for anything else."""
    return RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of those",
        param="prompt",
    )


class Choices:
    """The choices of an answer, whole or as pieces."""

    def __init__(self, service: Service, job: Job, answer: Answer):
        assert service.tokenizer is not None
        self._tokenizer = service.tokenizer
        self._job = job
        self._answer = answer

    def whole(self, index: int, delta: Delta) -> dict[str, Any]:
        """Choice `index` of an answer in one piece."""
        job = self._job
        if not job.body.echo:
            return self.piece(index, delta)
        if job.scoring:
            delta = Delta("", [], [], [], FinishReason.LENGTH)
        echo = self.echo(index)
        choice = self.piece(index, delta)
        choice["text"] = echo["text"] + choice["text"]
        if job.logprobs:
            choice["logprobs"] = {
                name: echo["logprobs"][name] + entries
                for name, entries in choice["logprobs"].items()
            }
        return choice

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """Choice `index` with what one Delta says."""
        shift = len(self._job.texts[index // self._job.n]) if self._job.body.echo else 0
        offsets = [offset + shift for offset in delta.offsets]
        logprobs = None
        if self._job.logprobs:
            logprobs = table(self._tokenizer, delta.token_ids, delta.logprobs, offsets)
        return {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def echo(self, index: int) -> dict[str, Any]:
        """Choice `index` with its prompt, and the prompt's log-probabilities where asked for."""
        which = index // self._job.n
        choice = self.piece(index, Delta(self._job.texts[which], [], [], []))
        if self._job.logprobs:
            ids = self._job.prompts[which]
            entries = [None, *self._answer.sequences[index].prompt_entries]
            offsets = prompt_offsets(self._tokenizer, ids)
            choice["logprobs"] = table(self._tokenizer, ids, entries, offsets)
        return choice

    def usage(self) -> dict[str, Any]:
        """The usage of the whole answer; a prompt counts once, however many choices it has."""
        return usage_of(self._answer, self._job.n, count_output=not self._job.scoring)


class CompletionEvents:
    """The stream of an answer."""

    def __init__(self, service: Service, job: Job, answer: Answer):
        self._choices = Choices(service, job, answer)
        self._job = job
        self._answer = answer
        self._envelope = Envelope(job.head.fields(), usage=job.body.include_usage)
        self._around: dict[int, tuple[bytes, bytes]] = {}
        self._echoed: set[int] = set()

    def begin(self) -> bytes:
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        if self._job.body.echo:
            return self._echo_once(index) + self._after_echo(index, delta)
        return self._piece(index, delta)

    def end(self) -> bytes:
        if not self._job.body.include_usage:
            return b""
        return self._envelope.usage(self._choices.usage())

    def _piece(self, index: int, delta: Delta) -> bytes:
        if delta.finish_reason is not None or delta.logprobs:
            return self._envelope.chunk(self._choices.piece(index, delta))
        if not delta.text:
            return b""
        around = self._around.get(index)
        if around is None:
            empty = self._choices.piece(index, Delta(MARK, [], [], []))
            around = self._around[index] = self._envelope.around_text(empty, MARK)
        return around[0] + encode(delta.text) + around[1]

    def _echo_once(self, index: int) -> bytes:
        """The prompt, before the first token: only then are its log-probabilities all there."""
        if index in self._echoed:
            return b""
        self._echoed.add(index)
        return self._envelope.chunk(self._choices.echo(index))

    def _after_echo(self, index: int, delta: Delta) -> bytes:
        if self._job.scoring:
            delta = Delta("", [], [], [], FinishReason.LENGTH)
        return self._piece(index, delta)


def table(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    entries: Sequence[PositionLogprobs | None],
    offsets: Sequence[int],
) -> dict[str, list[Any]]:
    """Log-probabilities as completions show them: four columns. A prompt's first token has none."""
    columns: dict[str, list[Any]] = {
        "text_offset": list(offsets),
        "token_logprobs": [],
        "tokens": [tokenizer.token_string(id) for id in ids],
        "top_logprobs": [],
    }
    for id, entry in zip(ids, entries, strict=True):
        shown = None if entry is None else text_token(tokenizer, id, entry)
        columns["token_logprobs"].append(None if shown is None else shown[0])
        columns["top_logprobs"].append(None if shown is None else shown[1])
    return columns


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """For every prompt token, the characters of the prompt's text before it."""
    stream, offsets, length = detokenizer(tokenizer), [], 0
    for id in ids:
        offsets.append(length)
        length += len(stream.push(id))
    return offsets
