"""`POST /v1/chat/completions`: messages in, an assistant's message out, whole or as a stream."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api.answer import Answer, reading
from pagedserve.api.door import visit_of
from pagedserve.api.openai_logprobs import chat_logprobs
from pagedserve.api.openai_schema import NEUTRAL_CHAT, ChatBody, read_body
from pagedserve.api.openai_shapes import Head, check_model, choices_of, json_response, usage_of
from pagedserve.api.service import INLINE_BYTES, Service
from pagedserve.api.sse import Envelope, EventStream, encode
from pagedserve.api.threads import in_thread_if
from pagedserve.errors import RequestError
from pagedserve.request import SamplingParams, check_prompt_tokens, most_tokens
from pagedserve.text.chat import NO_TEMPLATE, check_messages
from pagedserve.text.deltas import Delta
from pagedserve.text.tokenizer import Tokenizer

MARK = "\ue000"  # stands for the text while a chunk's unchanging part is rendered


async def create_chat_completion(service: Service, request: HttpRequest) -> Response:
    """The handler."""
    service.check_available()
    body = await read_body(request, ChatBody, NEUTRAL_CHAT, service.limits)
    check_model(service, body.model)
    params = body.params(
        service.generation.defaults,
        service.limits,
        max_tokens=body.limit(),
        logprobs=body.num_logprobs(service.limits),
    )
    visit = visit_of(request)
    priority = visit.tenant.priority(body.priority)
    large = len(await request.body()) > INLINE_BYTES
    prompt, params = await in_thread_if(large, prepare, service, body, params)
    answer = service.submit([prompt], [params], visit, priority=priority)
    assert service.tokenizer is not None
    if body.stream:
        head = Head.of(service, request, "chatcmpl", "chat.completion.chunk")
        return EventStream(answer, ChatEvents(service.tokenizer, body, head, answer))
    async with reading(answer, request.receive):
        choices = await choices_of(answer, partial(whole_choice, service.tokenizer, body))
    head = Head.of(service, request, "chatcmpl", "chat.completion")
    return json_response(head.fields() | {"choices": choices, "usage": usage_of(answer, params.n)})


def prepare(
    service: Service, body: ChatBody, params: SamplingParams
) -> tuple[list[int], SamplingParams]:
    """The token ids that the chat template makes of the messages, and `params` settled for them.

    Raises RequestError. May run in a thread.
    """
    limits = service.limits
    messages = check_messages(body.messages, limits)
    most = most_tokens(params, params.n, limits)
    if service.template is None:
        raise RequestError(NO_TEMPLATE, param="messages", code="no_chat_template")
    text = service.template.render(messages)
    service.check_chars([text], param="messages")
    # The template wrote the special tokens; the tokenizer must not add them again.
    ids = service.encode(text, add_special_tokens=False)
    check_prompt_tokens(len(ids) * params.n, limits, param="messages")
    usual = min(service.generation.max_tokens or most, most)
    least = service.generation.min_tokens if body.min_tokens is None else 0
    return ids, service.check(ids, params, param="messages", usual_tokens=usual, least_tokens=least)


async def whole_choice(
    tokenizer: Tokenizer, body: ChatBody, index: int, delta: Delta
) -> dict[str, Any]:
    """Choice `index` of an answer in one piece."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": delta.text, "refusal": None},
        "logprobs": await chat_logprobs(tokenizer, delta) if body.logprobs else None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }


class ChatEvents:
    """The stream of an answer: role, content, finish, usage."""

    def __init__(self, tokenizer: Tokenizer, body: ChatBody, head: Head, answer: Answer):
        self._tokenizer = tokenizer
        self._body = body
        self._answer = answer
        self._envelope = Envelope(head.fields(), usage=body.include_usage)
        self._around = [
            self._envelope.around_text(self._choice(index, {"content": MARK}), MARK)
            for index in range(len(answer.sequences))
        ]

    def begin(self) -> bytes:
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(
            self._envelope.chunk(self._choice(index, role))
            for index in range(len(self._answer.sequences))
        )

    async def delta(self, index: int, delta: Delta) -> bytes:
        parts = []
        if self._body.logprobs and delta.logprobs:
            logprobs = await chat_logprobs(self._tokenizer, delta)
            choice = self._choice(index, {"content": delta.text}, logprobs)
            parts.append(self._envelope.chunk(choice))
        elif delta.text:
            before, after = self._around[index]
            parts.append(before + encode(delta.text) + after)
        if delta.finish_reason is not None:
            # In a chunk of its own: clients take the finish chunk for one without content.
            finish = self._choice(index, {})
            finish["finish_reason"] = delta.finish_reason
            finish["stop_reason"] = delta.stop_reason
            parts.append(self._envelope.chunk(finish))
        return b"".join(parts)

    def end(self) -> bytes:
        if not self._body.include_usage:
            return b""
        return self._envelope.usage(usage_of(self._answer, len(self._answer.sequences)))

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
