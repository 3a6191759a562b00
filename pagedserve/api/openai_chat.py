"""`POST /v1/chat/completions`: messages in, an assistant's message out, whole or as a stream."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api.answer import Answer, joined, reading
from pagedserve.api.openai_schema import NEUTRAL_CHAT, ChatBody, read_body
from pagedserve.api.openai_shapes import Head, chat_token, check_model, json_response, usage_of
from pagedserve.api.service import INLINE_CHARS, Service
from pagedserve.api.sse import Envelope, EventStream, encode
from pagedserve.errors import RequestError
from pagedserve.text.chat import NO_TEMPLATE, check_messages
from pagedserve.text.deltas import Delta
from pagedserve.text.tokenizer import Tokenizer

INLINE_MESSAGES = 64  # rendered faster than a thread is reached
MARK = "\ue000"  # stands for the text while a chunk's unchanging part is rendered


async def create_chat_completion(service: Service, request: HttpRequest) -> Response:
    """The handler."""
    service.check_available()
    body = await read_body(request, ChatBody, NEUTRAL_CHAT)
    check_model(service, body.model)
    tokenizer = service.tokenizer
    assert tokenizer is not None
    params = body.params(max_tokens=body.limit(), logprobs=body.num_logprobs())
    prompt = await prompt_of(service, body)
    params = service.check(prompt, params, param="messages")
    answer = service.submit([prompt], [params], priority=body.priority or 0)
    if body.stream:
        head = Head.of(service, request, "chatcmpl", "chat.completion.chunk")
        return EventStream(answer, ChatEvents(tokenizer, body, head, answer))
    async with reading(answer, request.receive):
        deltas = await answer.collect()
    return json_response(
        Head.of(service, request, "chatcmpl", "chat.completion").fields()
        | {
            "choices": [
                whole_choice(tokenizer, body, index, joined(pieces))
                for index, pieces in enumerate(deltas)
            ],
            "usage": usage_of(answer, params.n),
        }
    )


async def prompt_of(service: Service, body: ChatBody) -> list[int]:
    """The token ids that the chat template makes of the messages. Raises RequestError."""
    messages = check_messages(body.messages)
    if service.template is None:
        raise RequestError(NO_TEMPLATE, param="messages", code="no_chat_template")
    render = service.template.render
    size = sum(len(message["content"]) for message in messages)
    if size <= INLINE_CHARS and len(messages) <= INLINE_MESSAGES:
        text = render(messages)
    else:
        text = await asyncio.to_thread(render, messages)
    # The template wrote the special tokens; the tokenizer must not add them again.
    (ids,) = await service.encode([text], param="messages", add_special_tokens=False)
    return ids


def whole_choice(tokenizer: Tokenizer, body: ChatBody, index: int, delta: Delta) -> dict[str, Any]:
    """Choice `index` of an answer in one piece."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": delta.text, "refusal": None},
        "logprobs": logprobs_of(tokenizer, delta) if body.logprobs else None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }


def logprobs_of(tokenizer: Tokenizer, delta: Delta) -> dict[str, Any]:
    """The log-probabilities of a Delta's tokens."""
    pairs = zip(delta.token_ids, delta.logprobs, strict=True)
    return {"content": [chat_token(tokenizer, id, entry) for id, entry in pairs], "refusal": None}


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

    def delta(self, index: int, delta: Delta) -> bytes:
        parts = []
        if self._body.logprobs and delta.logprobs:
            logprobs = logprobs_of(self._tokenizer, delta)
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
