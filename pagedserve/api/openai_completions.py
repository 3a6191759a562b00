"""`POST /v1/completions`: prompts in, text out, in one piece or as a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api.answer import Answer, reading
from pagedserve.api.door import visit_of
from pagedserve.api.openai_logprobs import Table, prompt_offsets
from pagedserve.api.openai_schema import NEUTRAL_COMPLETION, CompletionBody, read_body
from pagedserve.api.openai_shapes import Head, check_model, choices_of, json_response, usage_of
from pagedserve.api.service import INLINE_BYTES, Service
from pagedserve.api.sse import Envelope, EventStream, encode
from pagedserve.api.threads import in_thread_if
from pagedserve.errors import ContextLengthExceeded, RequestError
from pagedserve.limits import Limits
from pagedserve.request import (
    FinishReason,
    SamplingParams,
    check_num_sequences,
    check_prompt_tokens,
    most_tokens,
)
from pagedserve.text.deltas import Delta

DEFAULT_MAX_TOKENS = 16  # OpenAI's, where the model has none
MARK = "\ue000"  # stands for the text while a chunk's unchanging part is rendered
NOTHING = Delta("", [], [], [])


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

    @property
    def n(self) -> int:
        """Choices a prompt."""
        return self.params[0].n


async def create_completion(service: Service, request: HttpRequest) -> Response:
    """The handler."""
    service.check_available()
    body = await read_body(request, CompletionBody, NEUTRAL_COMPLETION, service.limits)
    check_model(service, body.model)
    head = Head.of(service, request, "cmpl", "text_completion")
    visit = visit_of(request)
    priority = visit.tenant.priority(body.priority)
    large = len(await request.body()) > INLINE_BYTES
    job = await in_thread_if(large, prepare, service, body, head)
    answer = service.submit(job.prompts, job.params, visit, priority=priority)
    if body.stream:
        return EventStream(answer, CompletionEvents(service, job, answer))
    rendering = Choices(service, job, answer)
    async with reading(answer, request.receive):
        choices = await choices_of(answer, rendering.whole)
    return json_response(head.fields() | {"choices": choices, "usage": rendering.usage()})


def prepare(service: Service, body: CompletionBody, head: Head) -> Job:
    """Tokenise and check the prompts, settle the parameters. May run in a thread.

    Raises RequestError at the first prompt that is unfit: those after it cost nothing.
    """
    scoring, limits = bool(body.echo) and body.max_tokens == 0, service.limits
    params = body.params(
        service.generation.defaults,
        limits,
        max_tokens=1 if scoring else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    job = Job(body, head, [], [], [], scoring, body.logprobs is not None)
    prompts = read_prompts(body.prompt, limits)
    num_sequences = len(prompts) * params.n
    check_num_sequences(num_sequences, limits)
    most = most_tokens(params, num_sequences, limits)
    service.check_chars([each for each in prompts if isinstance(each, str)], param="prompt")
    num_tokens = 0  # of prompts, for every sequence
    for prompt in prompts:
        ids = service.encode(prompt) if isinstance(prompt, str) else prompt
        add_prompt(service, job, prompt, ids, params, most)
        num_tokens += len(ids) * params.n
        check_prompt_tokens(num_tokens, limits, param="prompt")
        check_prompt_entries(num_tokens, params, limits)
    return job


def add_prompt(
    service: Service,
    job: Job,
    prompt: str | list[int],
    ids: list[int],
    params: SamplingParams,
    most: int,
) -> None:
    """Check `prompt`, whose tokens are `ids`, and add it to `job`. Raises RequestError.

    `most`: tokens that may be written behind it where the request does not say how many.
    """
    assert service.tokenizer is not None
    if job.scoring:
        check_scored(len(ids), service.check_available().max_model_len)
    usual = min(service.generation.max_tokens or DEFAULT_MAX_TOKENS, most)
    least = service.generation.min_tokens if job.body.min_tokens is None else 0
    settled = service.check(
        ids, params, param="prompt", usual_tokens=usual, least_tokens=0 if job.scoring else least
    )
    job.prompts.append(ids)
    job.params.append(settled)
    if job.body.echo:
        job.texts.append(prompt if isinstance(prompt, str) else service.tokenizer.decode(ids))


def check_prompt_entries(num_tokens: int, params: SamplingParams, limits: Limits) -> None:
    """Raise RequestError for an answer with too many log-probabilities of prompts.

    `num_tokens`: of the prompts, for every sequence.
    """
    most = limits.logprob_entries
    if params.prompt_logprobs is not None and num_tokens * (params.prompt_logprobs + 1) > most:
        raise RequestError(
            f"with echo, prompt tokens times n times (logprobs + 1) may be {most} at "
            "most, and this request has more. Send fewer prompts at a time, or lower logprobs.",
            param="logprobs",
        )


def check_scored(num_tokens: int, max_model_len: int) -> None:
    """Raise ContextLengthExceeded where a prompt is too long to be scored."""
    if num_tokens < max_model_len:
        return
    raise ContextLengthExceeded(
        f"This model's maximum context length is {max_model_len} tokens. To score a prompt (echo "
        "with max_tokens 0) one token more is computed, which is not shown, so a prompt may have "
        f"{max_model_len - 1} tokens; this one has {num_tokens}. Shorten it.",
        param="prompt",
    )


def read_prompts(prompt: Any, limits: Limits) -> list[str | list[int]]:
    """The prompts of a request: a string, token ids, or a list of either. Raises RequestError."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise bad_prompt()
    if not prompt:
        raise RequestError("prompt is empty; give at least one token", param="prompt")
    kinds = {type(each) for each in prompt}  # no C loop: it would keep the other threads waiting
    if kinds == {int}:
        return [prompt]
    if len(prompt) > limits.prompts:
        raise RequestError(
            f"prompt holds {len(prompt)} prompts; at most {limits.prompts} are allowed",
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

    async def whole(self, index: int, delta: Delta) -> dict[str, Any]:
        """Choice `index` of an answer in one piece."""
        if not self._job.body.echo:
            return await self.piece(index, delta)
        if self._job.scoring:
            delta = Delta("", [], [], [], FinishReason.LENGTH)
        table = self._table()
        await self._add_prompt(table, index)
        await self._add_answer(table, index, delta)
        return self._choice(index, self._text(index) + delta.text, table, delta)

    async def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """Choice `index` with what one Delta says."""
        table = self._table()
        await self._add_answer(table, index, delta)
        return self._choice(index, delta.text, table, delta)

    async def echo(self, index: int) -> dict[str, Any]:
        """Choice `index` with its prompt, and the prompt's log-probabilities where asked for."""
        table = self._table()
        await self._add_prompt(table, index)
        return self._choice(index, self._text(index), table, NOTHING)

    def around(self, index: int) -> dict[str, Any]:
        """Choice `index` with MARK where its text stands."""
        return self._choice(index, MARK, self._table(), NOTHING)

    def usage(self) -> dict[str, Any]:
        """The usage of the whole answer; a prompt counts once, however many choices it has."""
        return usage_of(self._answer, self._job.n, count_output=not self._job.scoring)

    def _table(self) -> Table | None:
        return Table(self._tokenizer) if self._job.logprobs else None

    def _text(self, index: int) -> str:
        """The prompt of choice `index`, which stands before its answer; empty without echo."""
        return self._job.texts[index // self._job.n] if self._job.body.echo else ""

    async def _add_prompt(self, table: Table | None, index: int) -> None:
        if table is None:
            return
        ids = self._job.prompts[index // self._job.n]
        entries = [None, *self._answer.sequences[index].prompt_entries]
        await table.add(ids, entries, prompt_offsets(self._tokenizer, ids))

    async def _add_answer(self, table: Table | None, index: int, delta: Delta) -> None:
        if table is None:
            return
        shift = len(self._text(index))
        offsets = (offset + shift for offset in delta.offsets)
        await table.add(delta.token_ids, delta.logprobs, offsets)

    def _choice(self, index: int, text: str, table: Table | None, end: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if table is None else table.json(),
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }


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

    async def delta(self, index: int, delta: Delta) -> bytes:
        if self._job.body.echo:
            return await self._echo_once(index) + await self._after_echo(index, delta)
        return await self._piece(index, delta)

    def end(self) -> bytes:
        if not self._job.body.include_usage:
            return b""
        return self._envelope.usage(self._choices.usage())

    async def _piece(self, index: int, delta: Delta) -> bytes:
        if delta.finish_reason is not None or delta.logprobs:
            return self._envelope.chunk(await self._choices.piece(index, delta))
        if not delta.text:
            return b""
        around = self._around.get(index)
        if around is None:
            around = self._envelope.around_text(self._choices.around(index), MARK)
            self._around[index] = around
        return around[0] + encode(delta.text) + around[1]

    async def _echo_once(self, index: int) -> bytes:
        """The prompt, before the first token: only then are its log-probabilities all there."""
        if index in self._echoed:
            return b""
        self._echoed.add(index)
        return self._envelope.chunk(await self._choices.echo(index))

    async def _after_echo(self, index: int, delta: Delta) -> bytes:
        if self._job.scoring:
            delta = Delta("", [], [], [], FinishReason.LENGTH)
        return await self._piece(index, delta)
