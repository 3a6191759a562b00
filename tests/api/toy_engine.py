"""An engine process without a model: it writes each prompt back, over and over.

`python -m tests.api.toy_engine FD` speaks the real channel. Requests give orders by their seed:

    DIE        the process exits with status 3
    FAIL       this request fails after two tokens
    SLOW       one token each 20 ms
    NEVER      no token at all: it waits in the queue
    BEGUN      it is computed, and never has a token
    HANG       the process hangs after two tokens
    RAISE      the engine reports an exception after two tokens, and ends

A request that goes on after an engine's death goes on where it was.

Its Stats say how many it runs and, as `preemptions`, how many live requests were aborted, as
`prefix_hits`, how many aborts came for requests that were not alive.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass

from pagedserve.engine.channel import (
    Abort,
    Channel,
    ChannelClosed,
    Configure,
    Control,
    Dead,
    Failed,
    Finish,
    Outputs,
    Progress,
    Ready,
    Stats,
    Submit,
)
from pagedserve.request import Request
from pagedserve.step import TokenLogprobs

DIE, FAIL, SLOW, NEVER, BEGUN, HANG, RAISE = 6661, 6662, 6663, 6664, 6665, 6666, 6667
PLACES = " of /very/secret/weights.bin at 0x7f0011223344"  # that no client may see
MAX_MODEL_LEN = 2048
STEP_SECONDS = 0.001
BEAT_SECONDS = 0.1  # between signs of life of an idle toy


@dataclass
class Row:
    """A request and how far it is."""

    request: Request
    written: int = 0
    due: float = 0.0
    started: bool = False


class Toy:
    """The loop."""

    def __init__(self, channel: Channel, eos: int, vocab_size: int):
        self.channel = channel
        self.eos = eos
        self.vocab_size = vocab_size
        self.rows: dict[int, Row] = {}
        self.aborted = 0
        self.useless = 0
        self.stopping = False
        self.beat = 0.0

    def run(self) -> None:
        while not self.stopping:
            for message in self.channel.receive(STEP_SECONDS if self.rows else BEAT_SECONDS):
                self.take(message)
            self.step()
            if time.monotonic() - self.beat > BEAT_SECONDS and not self.channel.pending:
                self.send_stats()

    def take(self, message: object) -> None:
        match message:
            case Submit(requests=requests):
                for request in requests:
                    assert max(request.prompt_token_ids) < self.vocab_size
                    self.rows[request.id] = Row(request, len(request.written))
            case Abort(ids=ids):
                for id in ids:
                    known = self.rows.pop(id, None) is not None
                    self.aborted += known
                    self.useless += not known
            case Control(name="shutdown"):
                self.stopping = True
        self.send_stats()

    def step(self) -> None:
        new = [(id, 1) for id, row in self.rows.items() if not row.started and self.computes(row)]
        if new:
            self.channel.send(Outputs([], [], started=new))
        for id, _ in new:
            self.rows[id].started = True
        outputs = Outputs([], [], [], [], [], [])
        for id, row in list(self.rows.items()):
            self.advance(id, row, outputs)
        if outputs.ids:
            self.channel.send(outputs)
        if outputs.finished:
            self.send_stats()

    def computes(self, row: Row) -> bool:
        return row.request.params.seed != NEVER

    def advance(self, id: int, row: Row, outputs: Outputs) -> None:
        request, now = row.request, time.monotonic()
        order = request.params.seed
        if not self.computes(row) or now < row.due:
            return
        if order == DIE and row.written == 2:
            os._exit(3)
        if order == RAISE and row.written == 2:
            self.channel.send(Dead(f"RuntimeError: a toy exception{PLACES}"))
            os._exit(1)
        if order == HANG and row.written == 2:
            time.sleep(600)
        if order == FAIL and row.written == 2:
            del self.rows[id]
            self.channel.send(Failed(id, "a toy failure"))
            return
        if order == SLOW:
            row.due = now + 0.02
        if order == BEGUN:
            row.due = float("inf")
            return
        if row.written == 0 and not request.num_scored:
            self.prompt_logprobs(request, outputs)
        token = request.prompt_token_ids[row.written % len(request.prompt_token_ids)]
        row.written += 1
        outputs.ids.append(id)
        outputs.token_ids.append(token)
        wanted = request.params.logprobs
        outputs.logprobs.append(None if wanted is None else self.entry(token, wanted))
        if (finish := self.finish(row, token)) is not None:
            outputs.finished.append(finish)
            del self.rows[id]

    def finish(self, row: Row, token: int) -> Finish | None:
        params = row.request.params
        early = row.written <= params.min_tokens
        ends = token in params.stop_token_ids or (token == self.eos and not params.ignore_eos)
        if ends and not early:
            return Finish(row.request.id, "stop", token)
        if row.written == params.max_tokens:
            return Finish(row.request.id, "length")
        return None

    def prompt_logprobs(self, request: Request, outputs: Outputs) -> None:
        wanted = request.params.prompt_logprobs
        if wanted is not None:
            entries = [self.entry(token, wanted) for token in request.prompt_token_ids[1:]]
            outputs.prompt_logprobs.append((request.id, entries))

    def entry(self, token: int, count: int) -> TokenLogprobs:
        tops = [(token + at) % self.vocab_size for at in range(count)]
        return TokenLogprobs(-0.5, 1, tops, [-0.5 - at for at in range(count)])

    def send_stats(self) -> None:
        self.beat = time.monotonic()
        self.channel.send(
            Stats(len(self.rows), 0, 100, len(self.rows), self.aborted, 7, self.useless, 1)
        )


def main(fd: int) -> None:
    channel = Channel(socket.socket(fileno=fd))
    try:
        channel.send(Progress("toy phase", 0.01))
        configure = wait_for_configure(channel)
        options = configure.options
        if options["load_format"] == "dummy":
            channel.send(Dead("a toy cannot hold dummy weights"))
            return
        if options["max_num_seqs"] == 13:  # a start that never ends
            time.sleep(600)
        if options["max_num_seqs"] == 14:  # one that hangs half-way
            for done in range(0, 501, 100):
                channel.send(Progress("toy weights", 0.02, f"{done} of 1000", done, 1000))
                time.sleep(0.02)
            time.sleep(600)
        if os.path.exists(hang := options["model"] + "/hang"):  # one that hangs this time only
            os.unlink(hang)
            time.sleep(600)
        vocab_size, eos = 600, 2
        if os.path.exists(options["model"] + "/tokenizer.json"):
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(options["model"] + "/tokenizer.json")
            vocab_size, eos = tokenizer.get_vocab_size(), tokenizer.token_to_id("</s>")
        longest = options["max_model_len"] or MAX_MODEL_LEN
        slots, stall = options["max_num_seqs"] or 256, options["engine_stall_timeout"] or 0.0
        channel.send(
            Ready(vocab_size, longest, 100, 16, slots, [eos], "cpu", "float32", 0.1, stall)
        )
        Toy(channel, eos, vocab_size).run()
    except ChannelClosed:
        pass


def wait_for_configure(channel: Channel) -> Configure:
    while True:
        for message in channel.receive(None):
            if isinstance(message, Configure):
                return message
            if isinstance(message, Control):
                raise ChannelClosed("shut down early")


if __name__ == "__main__":
    main(int(sys.argv[1]))
