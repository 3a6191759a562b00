"""The command line: `pagedserve serve | generate | chat | version`.

Flags and their help come from the fields of `config.py`. Errors are one line on standard error:
status 2 for wrong usage, 1 for a failure. What a command needs is imported when it is chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pagedserve.config import Config, add_flags
from pagedserve.errors import PagedServeError
from pagedserve.version import __version__

if TYPE_CHECKING:
    from types import FrameType

    from pagedserve.llm import LLM
    from pagedserve.request import SamplingParams

MODEL_GROUPS = ("model", "cache", "scheduler")
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    try:
        options = vars(parser().parse_args(arguments))
        command = options.pop("command")
        return int(command(options))
    except PagedServeError as error:
        print(f"pagedserve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        drop_output()
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands with their flags."""
    top = argparse.ArgumentParser(
        prog="pagedserve", description="An OpenAI-compatible LLM inference server."
    )
    top.add_argument("--version", action="version", version=f"pagedserve {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    serve_ = commands.add_parser("serve", help="serve a model over HTTP")
    serve_.add_argument(
        "model_argument", nargs="?", metavar="MODEL", help="directory or hub id; --model also works"
    )
    add_flags(serve_)
    serve_.set_defaults(command=serve)

    generate_ = commands.add_parser("generate", help="complete a prompt, without a server")
    generate_.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads stdin")
    generate_.set_defaults(command=generate)

    chat_ = commands.add_parser("chat", help="talk to a model, without a server")
    chat_.add_argument("--system", default=None, help="the system message")
    chat_.set_defaults(command=chat)

    for command in (generate_, chat_):
        add_sampling_flags(command)
        add_flags(command, groups=MODEL_GROUPS)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(command=print_version)
    return top


def add_sampling_flags(command: argparse.ArgumentParser) -> None:
    """The few sampling parameters that a terminal needs."""
    section = command.add_argument_group("sampling")
    section.add_argument("--max-tokens", type=int, default=256, help="tokens to write at most")
    section.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    section.add_argument("--top-p", type=float, default=1.0, help="share of likely tokens kept")
    section.add_argument("--top-k", type=int, default=0, help="number of tokens kept; 0: all")
    # Not --seed: that one is the model's, and the default of requests without a seed.


def serve(options: dict[str, Any]) -> int:
    """`pagedserve serve`."""
    from pagedserve.api.server import run

    model = options.pop("model_argument")
    if model is not None:
        if "model" in options:
            print("pagedserve: give MODEL or --model, not both", file=sys.stderr)
            return 2
        options["model"] = model
    return run(Config.from_options(options), say)


def generate(options: dict[str, Any]) -> int:
    """`pagedserve generate`."""
    prompt = options.pop("prompt")
    if prompt == "-":
        prompt = sys.stdin.read()
    params = sampling(options)
    with offline(options) as llm:
        for delta in llm.stream(prompt, fitting(llm, llm.get_tokenizer().encode(prompt), params)):
            write(delta.text)
    write("\n")
    return 0


def chat(options: dict[str, Any]) -> int:
    """`pagedserve chat`: Ctrl-C stops an answer, Ctrl-D leaves."""
    system = options.pop("system")
    params = sampling(options)
    with contextlib.suppress(ImportError):  # line editing and history, where there is any
        import readline  # noqa: F401
    messages = [] if system is None else [{"role": "system", "content": system}]
    with offline(options) as llm:
        say("Ctrl-C stops an answer, Ctrl-D leaves.")
        while (text := ask()) is not None:
            if not text.strip():
                continue
            messages.append({"role": "user", "content": text})
            try:
                answer = reply(llm, messages, params)
            except PagedServeError as error:
                say(f"pagedserve: {error.message}")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
    return 0


def ask() -> str | None:
    """A line from the terminal; None at its end."""
    while True:
        try:
            return input("> ")
        except EOFError:
            write("\n")
            return None
        except KeyboardInterrupt:
            write("\n")


def reply(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Write the answer to `messages` as it comes; what was written, also when interrupted."""
    prompt = llm.chat_prompt(messages)
    pieces = []
    with interruptible() as interrupted:
        stream = llm.stream(
            {"prompt_token_ids": prompt},
            fitting(llm, prompt, params),
            interrupted=lambda: bool(interrupted),
        )
        for delta in stream:
            pieces.append(delta.text)
            write(delta.text)
    write("\n")
    return "".join(pieces)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside, Ctrl-C only fills the list: raising in the middle of a read would lose bytes."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def offline(options: dict[str, Any]) -> LLM:
    """The offline engine, telling its phases on standard error."""
    from pagedserve.llm import LLM

    def report(phase: str, seconds: float) -> None:
        print(f"{seconds:6.2f} s  {phase}", file=sys.stderr)

    return LLM(**options, on_progress=report)


def sampling(options: dict[str, Any]) -> SamplingParams:
    """Take the sampling flags out of `options`."""
    from pagedserve.request import SamplingParams

    return SamplingParams(**{name: options.pop(name) for name in SAMPLING if name in options})


def fitting(llm: LLM, prompt: list[int], params: SamplingParams) -> SamplingParams:
    """`params` with as many tokens as still fit behind `prompt`."""
    room = max(llm.max_model_len - len(prompt), 1)
    return params.replace(max_tokens=min(params.max_tokens or room, room))


def print_version(options: dict[str, Any]) -> int:
    """`pagedserve version`."""
    say(f"pagedserve {__version__}")
    return 0


def say(line: str) -> None:
    """A line for people, at once."""
    write(f"{line}\n")


def write(text: str) -> None:
    """Text as it comes. Raises PagedServeError where standard output takes no more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has enough, such as `head`: nothing to complain of
        raise
    except OSError as error:
        drop_output()
        raise PagedServeError(
            f"cannot write to standard output: {error.strerror or error}"
        ) from error


def drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter's last flush would fail once more."""
    with contextlib.suppress(OSError):  # no file at all, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
