"""The channel's decoder: messages bent in their values, their bytes, their frames.

Whatever comes, a channel says either what it was told or that the other end is broken or gone.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

from pagedserve.engine.channel import (
    HEADER,
    AnyMessage,
    Channel,
    ChannelBroken,
    ChannelClosed,
)
from tests.reliability.bending import bent, bent_bytes, fuzz
from tests.test_channel import EVERY

ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(AnyMessage)
PIECE = 1 << 15  # what a socket takes while nobody reads
MESSAGES = st.lists(st.sampled_from(EVERY), min_size=1, max_size=3)


def said(messages: list[AnyMessage], r: random.Random) -> bytes:
    """Some frames, most of them bent."""
    stream = b""
    for message in messages:
        payload = ENCODER.encode(message)
        if r.random() < 0.7:
            payload = packed(bent(msgspec.msgpack.decode(payload), r, r.choice([1, 1, 2, 5])))
        if r.random() < 0.3:
            payload = bent_bytes(payload, r, r.choice([1, 1, 3]))
        length = len(payload)
        if r.random() < 0.1:
            length = r.choice([0, length - 1, length + 1, 2 * length, r.randrange(1 << 32)])
        stream += HEADER.pack(max(0, length)) + payload
    return bent_bytes(stream, r, 2) if r.random() < 0.1 else stream


def packed(value: Any) -> bytes:
    """As msgpack, where it can say that at all; else what it says of something near."""
    try:
        return ENCODER.encode(value)
    except (OverflowError, UnicodeEncodeError):  # an integer past 64 bits, half a surrogate pair
        return ENCODER.encode(str(value).encode("utf-8", "replace"))


def outcome(messages: list[AnyMessage], r: random.Random) -> str:
    """Send it in pieces; what the receiving end makes of it."""
    stream = said(messages, r)
    channel, raw = Channel.pair()
    received: list[AnyMessage] = []
    cuts = [r.randrange(len(stream) + 1) for _ in range(r.choice([0, 0, 1, 3]))]
    cuts = sorted([*cuts, *range(0, len(stream), PIECE)])
    try:
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            raw.sendall(stream[begin:end])
            received += channel.receive(0.0)
        raw.close()
        while True:
            received += channel.receive(0.0)
    except ChannelBroken:
        result = "broken"
    except ChannelClosed:
        result = "understood" if received else "half a frame"
    finally:
        channel.close()
        raw.close()
    for message in received:
        check_it_is_a_message(message)
    return result


def check_it_is_a_message(message: AnyMessage) -> None:
    """It goes on as it came: what is decoded can be sent again, and says the same."""
    again = ENCODER.encode(message)
    with contextlib.suppress(RecursionError):  # no process of ours nests so deep
        assert ENCODER.encode(DECODER.decode(again)) == again


@pytest.mark.parametrize("cases", [4_000, pytest.param(1_000_000, marks=pytest.mark.marathon)])
def test_what_is_no_message_breaks_the_channel_and_nothing_else(cases: int) -> None:
    outcomes = fuzz("channel", cases, MESSAGES, outcome)
    assert outcomes["broken"] > cases // 50 < outcomes["understood"]
