"""The channel: frames in any pieces, a peer that does not read, a peer that is gone.

And its two processes: what the engine's end does where the API's end dies, or torch is missing.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve.engine.channel import (
    HEADER,
    Abort,
    AnyMessage,
    Channel,
    ChannelBroken,
    ChannelClosed,
    Configure,
    Control,
    Dead,
    Failed,
    Finish,
    Message,
    Outputs,
    Progress,
    Ready,
    Stats,
    Submit,
)
from pagedserve.engine.client import EngineClient
from pagedserve.request import Request, SamplingParams
from pagedserve.step import TokenLogprobs

EVERY: list[Message] = [
    Configure({"model": "x", "port": 5, "seed": None, "ratio": 0.5}),
    Submit([Request(1, [1, 2], SamplingParams(stop=["x"], logit_bias={3: 1.0}), 7)]),
    Submit([Request(1, [1, 2], SamplingParams(), 7, 1, 0.5, [3, 4], 1)]),
    Submit([Request(1, [1], SamplingParams(), 7, tenant=3, weight=0.5, deadline=math.inf)]),
    Abort([1, 2]),
    Control("shutdown"),
    Progress("load", 0.5, "10 %"),
    Ready(9, 8, 7, 16, 6, [2], "cpu", "float32", 1.5, 60.0),
    Outputs(
        [1, 2],
        [5, 6],
        [Finish(1, "stop", 5)],
        [TokenLogprobs(-1.0, 1, [5], [-1.0]), None],
        [(2, [TokenLogprobs(-2.0, 3, [], [])])],
        [(1, 4)],
    ),
    Failed(1, "why"),
    Stats(1, 2, 3, 4, 5, 6, 7, 8),
    Dead("cause"),
]


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


def test_every_message_arrives_as_it_was_sent(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    for message in EVERY:
        a.send(message)
    assert b.receive(1.0) == EVERY
    b.send(EVERY[0])
    assert a.receive(1.0) == [EVERY[0]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60))
def test_frames_arrive_whole_however_the_bytes_come(sizes: list[int]) -> None:
    encoder = msgspec.msgpack.Encoder()
    payloads = [encoder.encode(message) for message in EVERY]
    stream = b"".join(HEADER.pack(len(payload)) + payload for payload in payloads)
    channel, raw = Channel.pair()
    received: list[AnyMessage] = []
    at = 0
    while at < len(stream):
        size = sizes[at % len(sizes)]
        raw.sendall(stream[at : at + size])
        received += channel.receive(0.0)
        at += size
    assert received == EVERY
    channel.close()
    raw.close()


def test_send_never_blocks_and_keeps_what_the_peer_does_not_take(
    pair: tuple[Channel, Channel],
) -> None:
    a, b = pair
    big = Failed(1, "x" * 100_000)
    start = time.monotonic()
    for id in range(50):
        a.send(Failed(id, big.message))
    assert time.monotonic() - start < 1.0
    assert a.pending
    received: list[AnyMessage] = []
    while len(received) < 50:
        received += b.receive(0.0)
        a.flush()
    assert [message.id for message in received if isinstance(message, Failed)] == list(range(50))
    assert not a.pending


def test_waiting_for_messages_sends_what_waits(pair: tuple[Channel, Channel]) -> None:
    """Two ends that both wait must not wait for each other."""
    a, b = pair
    for id in range(50):
        a.send(Failed(id, "x" * 100_000))
    got: list[AnyMessage] = []

    def read() -> None:
        while len(got) < 50:
            got.extend(b.receive(0.05))
        b.send(Abort([1]))

    reader = threading.Thread(target=read)
    reader.start()
    messages: list[AnyMessage] = []
    while not messages:
        messages = a.receive(1.0)
    reader.join()
    assert messages == [Abort([1])]


def test_nothing_to_read_is_no_message(pair: tuple[Channel, Channel]) -> None:
    assert pair[0].receive(0.0) == []
    start = time.monotonic()
    assert pair[0].receive(0.05) == []
    assert 0.03 < time.monotonic() - start < 1.0


def test_a_closed_peer_is_seen_after_its_last_message() -> None:
    channel, raw = Channel.pair()
    other = Channel(raw)
    other.send(Dead("cause"))
    other.close()
    assert channel.receive(1.0) == [Dead("cause")]
    with pytest.raises(ChannelClosed):
        channel.receive(1.0)
    with pytest.raises(ChannelClosed):
        channel.send(Abort([1]))
    channel.close()


def test_a_half_frame_before_the_end_is_dropped() -> None:
    channel, raw = Channel.pair()
    raw.sendall(HEADER.pack(100) + b"half")
    raw.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ChannelClosed):
        channel.receive(1.0)
    channel.close()
    raw.close()


STARTING = """
from pagedserve.engine.client import EngineClient
client = EngineClient()
while not client.phases:
    client.poll(1.0)
print(client.pid, flush=True)
input()
"""


def is_alive(pid: int) -> bool:
    """False also for a zombie, which nobody may be left to wait for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_an_engine_that_is_stopped_dies_with_its_parent() -> None:
    command = [sys.executable, "-c", STARTING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        os.kill(engine, signal.SIGSTOP)
        assert is_alive(engine)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(engine) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(engine)


def test_an_engine_started_in_a_thread_outlives_the_thread() -> None:
    made: list[EngineClient] = []
    thread = threading.Thread(target=lambda: made.append(EngineClient()))
    thread.start()
    thread.join()
    (client,) = made
    try:
        while not client.phases and client.cause_of_death is None:
            client.poll(1.0)
        client.poll(0.2)
        assert client.cause_of_death is None
        assert is_alive(client.pid)
    finally:
        client.close(0.0)


def test_a_parent_that_is_gone_already_is_none() -> None:
    command = [sys.executable, "-m", "pagedserve.engine.process", "0", str(os.getpid() + 1)]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libcudart.so.13:\\n  cannot open')", "libcudart.so.13: cannot open"),
        ("raise OSError('libc10.so: bad')", "libc10.so: bad"),
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
    ],
)
def test_an_engine_without_torch_says_so_in_one_line(
    source: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    client = EngineClient()
    try:
        while client.cause_of_death is None:
            client.poll(1.0)
    finally:
        client.close(5.0)
    cause = f"torch cannot be imported: {reason}; install torch>=2.11"
    assert client.cause_of_death == cause
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_no_message_breaks_the_channel() -> None:
    for payload in (b"xyz", b"\xc1", msgspec.msgpack.encode(["Outputs", [1], "no list"])):
        channel, raw = Channel.pair()
        raw.sendall(HEADER.pack(len(payload)) + payload)
        with pytest.raises(ChannelBroken, match="sent no message"):
            channel.receive(1.0)
        channel.close()
        raw.close()
