"""The command line: `pagedserve serve | generate | chat | bench | pull | convert | …`.

Flags and their help come from the fields of `config.py`. Errors are one line on standard error:
status 2 for wrong usage, 1 for a failure. What a command needs is imported when it is chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pagedserve.commands.console import Console, drop_output, say, write
from pagedserve.config import Config, add_flags
from pagedserve.errors import PagedServeError
from pagedserve.version import __version__

if TYPE_CHECKING:
    from types import FrameType

    from pagedserve.llm import LLM
    from pagedserve.request import SamplingParams

MODEL_GROUPS = ("model", "cache", "scheduler")
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k")
OF_MODULES = {  # of `pagedserve.commands`, with what their commands are for
    "pull": "download a model of the Hugging Face hub",
    "convert": "turn pickled weights into safetensors",
    "bench": "measure the engine, a server or its start",
    "plan": "say how a model's memory would be shared out",
    "models": "list the architectures that can be served",
    "tune": "find the fastest kernels for a model on this GPU",
    "build-kernels": "compile the C++ and CUDA kernels ahead",
}
TERMINAL_DEFAULTS = {"max_tokens": 256, "temperature": 0.0}  # where the model has none of its own


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
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)

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

    for name, text in OF_MODULES.items():
        commands.add_parser(name, help=text).fill = functools.partial(fill_from_module, name)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(command=print_version)
    return top


class Command(argparse.ArgumentParser):
    """The parser of one command. `fill` adds its flags, once, and only when it was chosen."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """See `argparse`, which calls it for the command that was chosen."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(*args, **options)


def fill_from_module(name: str, command: argparse.ArgumentParser) -> None:
    """The flags of a command that has a module of its own."""
    module = importlib.import_module(f"pagedserve.commands.{name.replace('-', '_')}")
    module.add_flags(command)
    command.set_defaults(command=module.run)


def add_sampling_flags(command: argparse.ArgumentParser) -> None:
    """The few sampling parameters that a terminal needs."""
    section = command.add_argument_group("sampling")
    for flag, kind, usual, text in (
        ("--max-tokens", int, "256", "tokens to write at most"),
        ("--temperature", float, "0", "0 takes the likeliest"),
        ("--top-p", float, "1", "share of likely tokens kept"),
        ("--top-k", int, "0", "number of tokens kept; 0: all"),
    ):
        default = f"(default: the model's own, or {usual})"
        section.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} {default}")
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
    console = Console()
    try:
        return run(Config.from_options(options), console)
    finally:
        console.end()


def generate(options: dict[str, Any]) -> int:
    """`pagedserve generate`."""
    prompt = options.pop("prompt")
    if prompt == "-":
        prompt = sys.stdin.read()
    given = sampling(options)
    with offline(options) as llm:
        ids = llm.get_tokenizer().encode(prompt)
        for delta in llm.stream(prompt, fitting(llm, ids, given)):
            write(delta.text)
    write("\n")
    return 0


def chat(options: dict[str, Any]) -> int:
    """`pagedserve chat`: Ctrl-C stops an answer, Ctrl-D leaves."""
    system = options.pop("system")
    given = sampling(options)
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
                answer = reply(llm, messages, given)
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


def reply(llm: LLM, messages: list[dict[str, str]], given: dict[str, Any]) -> str:
    """Write the answer to `messages` as it comes; what was written, also when interrupted."""
    prompt = llm.chat_prompt(messages)
    pieces = []
    with interruptible() as interrupted:
        stream = llm.stream(
            {"prompt_token_ids": prompt},
            fitting(llm, prompt, given),
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

    llm = LLM(**options, on_progress=report)
    for line in llm.notes:
        print(f"{'':10} {line}", file=sys.stderr)
    return llm


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling flags out of `options`. Raises RequestError for a value out of range."""
    from pagedserve.request import SamplingParams

    given = {name: options.pop(name) for name in SAMPLING if name in options}
    SamplingParams(**given)  # before a model is loaded
    return given


def fitting(llm: LLM, prompt: list[int], given: dict[str, Any]) -> SamplingParams:
    """The `given` parameters and defaults, with as many tokens as still fit behind `prompt`."""
    usual = {
        name: llm.generation.defaults.get(name, value) for name, value in TERMINAL_DEFAULTS.items()
    }
    wanted = {**usual, **given}
    room = max(llm.max_model_len - len(prompt), 1)
    wanted["max_tokens"] = min(wanted["max_tokens"] or room, room)
    return llm.generation.sampling_params(**wanted)


def print_version(options: dict[str, Any]) -> int:
    """`pagedserve version`."""
    say(f"pagedserve {__version__}")
    return 0
