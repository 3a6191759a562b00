"""A process that asks a server for streamed answers and notes when their pieces come.

`python -m pagedserve.commands.bench.client` reads a Plan from standard input, says that it has
it, reads the moment to start, asks, and writes the Outcomes. Sockets are raw and no chunk is
parsed as JSON: one process keeps up with tens of thousands of tokens a second, and a run has
several (`clients.py`), so that what is measured is the server.

    parent ── length, Plan ──▶ child      child ── READY ──▶ parent
    parent ── start (8 bytes) ─▶ child    child ── [Outcome] ──▶ parent, end
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import struct
import sys
import time
from contextlib import suppress
from typing import BinaryIO

import msgspec

from pagedserve.commands.bench.figures import Outcome

READY = b"R"
READ_BYTES = 1 << 18
ENDS = (b'"choices":[{', b'"choices": [{')  # what a piece of an answer has, and nothing else
KEEP_BYTES = max(map(len, ENDS)) - 1  # of what was read: half a mark may be at its end
TAIL_BYTES = 8192  # holds the usage, or an error, and the end
CUT_BYTES = 16 * TAIL_BYTES  # cut to the tail now and then: for each piece it would cost more
MESSAGE_CHARS = 300
DONE, LAST_CHUNK = b"[DONE]", b"0\r\n\r\n"
ERROR_EVENT = re.compile(rb'^data: ?(\{ ?"error".*)$', re.M)
CONTENT_LENGTH = re.compile(rb"^content-length: *(\d+)", re.M | re.I)
USAGE = {  # field of the outcome → where the server says it
    "num_prompt": re.compile(rb'"prompt_tokens":\s*(\d+)'),
    "num_tokens": re.compile(rb'"completion_tokens":\s*(\d+)'),
}
NO_HTTP = 599  # in the place of a status


class Job(msgspec.Struct, array_like=True):
    """A request: when to send it (seconds after the start), its body, the tokens it must bring.

    `num_tokens` is None where an answer may be of any length.
    """

    at: float
    body: bytes
    num_tokens: int | None = None


class Plan(msgspec.Struct, array_like=True):
    """What one process does. `head`: the request's first bytes, up to its Content-Length."""

    host: str
    port: int
    tls: bool
    head: bytes
    concurrency: int
    timeout: float
    jobs: list[Job]


def main() -> int:
    """The process."""
    import uvloop

    source, sink = sys.stdin.buffer, sys.stdout.buffer
    (length,) = struct.unpack("<Q", source.read(8))
    plan = msgspec.msgpack.decode(source.read(length), type=Plan)
    sink.write(READY)
    sink.flush()
    given = source.read(8)
    if len(given) < 8:
        return 1  # the parent gave up
    (start,) = struct.unpack("<d", given)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcomes = runner.run(ask_all(plan, start))
    write_all(sink, msgspec.msgpack.encode(outcomes))
    return 0


def write_all(sink: BinaryIO, data: bytes) -> None:
    """All of it: with PYTHONUNBUFFERED a write to a pipe may take a part."""
    left = memoryview(data)
    while left:
        left = left[sink.write(left) or 0 :]
    sink.flush()


async def ask_all(plan: Plan, start: float) -> list[Outcome]:
    """Every job at its time, no more than `plan.concurrency` of them under way."""
    slots = asyncio.Semaphore(plan.concurrency)
    await asyncio.sleep(max(0.0, start - time.monotonic()))

    async def one(job: Job) -> Outcome:
        if job.at > 0:
            await asyncio.sleep(max(0.0, start + job.at - time.monotonic()))
        async with slots:
            return await ask(plan, job)

    return await asyncio.gather(*map(one, plan.jobs))


async def ask(plan: Plan, job: Job) -> Outcome:
    """One request on a connection of its own. What goes wrong stands in its outcome."""
    outcome = Outcome(time.monotonic())
    try:
        async with asyncio.timeout(plan.timeout):
            reader, writer = await asyncio.open_connection(
                plan.host, plan.port, limit=1 << 20, ssl=plan.tls or None
            )
            try:
                outcome.began = time.monotonic()
                writer.write(plan.head + b"%d\r\n\r\n" % len(job.body) + job.body)
                await read_answer(reader, outcome)
            finally:
                writer.close()
    except TimeoutError:
        outcome.error = f"no end within {plan.timeout:g} s"
    except ssl.SSLError as error:
        outcome.error = f"TLS: {error.reason or error}"
    except OSError as error:
        outcome.error = f"connection: {error.strerror or error}"
    else:
        judge(outcome, job)
    return outcome


async def read_answer(reader: asyncio.StreamReader, outcome: Outcome) -> None:
    """Take a response to its end, and fill in the outcome."""
    recent, kept, sized = bytearray(), b"", False
    while data := await reader.read(READ_BYTES):
        now = time.monotonic()
        if not outcome.status:
            data = bytes(recent) + data
            recent.clear()
            outcome.status = status_of(data)
            head = data.partition(b"\r\n\r\n")[0]
            sized = outcome.status > 0 and CONTENT_LENGTH.search(head) is not None
        recent += data
        if len(recent) > CUT_BYTES:
            del recent[:-TAIL_BYTES]
        if outcome.status == 200:
            piece = kept + data
            outcome.at += [now] * sum(map(piece.count, ENDS))
            kept = piece[-KEEP_BYTES:]
        if (sized and is_whole(recent)) or (recent.endswith(LAST_CHUNK) and DONE in recent):
            break
    if outcome.status != 200:
        outcome.error = refusal(outcome.status, recent)
    elif found := ERROR_EVENT.search(recent):
        outcome.error = message_of(found[1])
    elif DONE not in recent:
        outcome.error = "the connection ended in the middle of an answer"
    for field, pattern in USAGE.items():
        if counts := pattern.findall(recent):
            setattr(outcome, field, int(counts[-1]))


def judge(outcome: Outcome, job: Job) -> None:
    """An answer that is not what was asked for is a failure, though nothing was refused."""
    if outcome.error:
        return
    if not outcome.at:
        outcome.error = "an answer without a token"
    elif job.num_tokens is not None and outcome.num_tokens not in (-1, job.num_tokens):
        outcome.error = f"{outcome.num_tokens} tokens of {job.num_tokens} asked for"


def status_of(data: bytes) -> int:
    """The status of a response that begins with `data`; 0 while that is not a whole head."""
    if b"\r\n\r\n" not in data and data.startswith(b"HTTP/"):
        return 0
    with suppress(IndexError, ValueError):
        if data.startswith(b"HTTP/"):
            return int(data.split(b" ", 2)[1])
    return NO_HTTP


def is_whole(data: bytes | bytearray) -> bool:
    """Whether a response has as many bytes as it says, where it says it."""
    head, _, body = data.partition(b"\r\n\r\n")
    length = CONTENT_LENGTH.search(head)
    return length is not None and len(body) >= int(length[1])


def refusal(status: int, response: bytes | bytearray) -> str:
    """A refused request's status and the server's words."""
    if not status:
        return "the connection ended without an answer"
    if status == NO_HTTP:
        return "what listens there does not speak HTTP"
    found = re.search(rb"\{.*\}", response, re.S)
    body = found[0] if found else response.rpartition(b"\r\n\r\n")[2]
    return f"HTTP {status}: {message_of(body)}"


def message_of(text: bytes | bytearray) -> str:
    """The message of an OpenAI error object, or the text itself, not too long."""
    shown = text.decode(errors="replace").strip()
    with suppress(ValueError, AttributeError, TypeError):
        value = json.loads(shown)
        error = value.get("error", value)
        shown = str(error.get("message", shown) if isinstance(error, dict) else error)
    return shown[:MESSAGE_CHARS]


if __name__ == "__main__":
    sys.exit(main())
