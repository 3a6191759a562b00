"""Messages to prompt text, by the Jinja template that belongs to the model.

Rendering is sandboxed and equal to transformers' `apply_chat_template`. The room knows the shape of
messages (`{"role", "content"}`), no tokens and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagedserve.errors import RequestError, StartupError, shorten, without_places
from pagedserve.limits import CEILING, Limits
from pagedserve.text.files import read_json
from pagedserve.text.tokenizer import Tokenizer

NO_TEMPLATE = (
    "this model has no chat template, so messages cannot be turned into a prompt; "
    "start the server with --chat-template FILE, or use /v1/completions"
)


ROLES = ("system", "developer", "user", "assistant")
NOT_YET = ("tool_calls", "function_call", "audio")  # of an earlier answer: null or empty only
WITHOUT_EFFECT = ("refusal", "annotations")  # what an SDK sends back of an earlier answer


class GenerationTag(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it only passes through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """A compiled chat template with the special tokens of its tokenizer.

    Raises StartupError when the source is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment().from_string(source)
        except TemplateError as error:
            raise StartupError(f"the chat template cannot be compiled: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt for `messages` (see `check_messages`). Raises RequestError with the cause."""
        if "developer" not in self.source:  # OpenAI's newer name of the system role
            messages = [{**message, "role": as_system(message["role"])} for message in messages]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:
            # Templates run any expression over what clients send: whatever they raise, the request
            # does not suit the template.
            reason = shorten(without_places(str(error)), 300)
            raise RequestError(
                f"the chat template refused the messages: {reason}", param="messages"
            ) from error


def check_messages(messages: Any, limits: Limits = CEILING) -> list[dict[str, Any]]:
    """Messages as templates take them: `role`, `content` as a string, `name` where given.

    Parts of text are joined by newlines. Raises RequestError that names the place: a wrong type, an
    unknown role or field, a part that is no text.
    """
    if not isinstance(messages, (list, tuple)):
        raise RequestError("messages must be a list", param="messages")
    if len(messages) > limits.messages:
        raise RequestError(
            f"there are {len(messages)} messages; at most {limits.messages} are allowed",
            param="messages",
        )
    if not messages:
        raise RequestError("messages is empty; give at least one message", param="messages")
    return [
        check_message(message, f"messages[{at}]", limits.message_parts)
        for at, message in enumerate(messages)
    ]


def check_message(message: Any, where: str, max_parts: int) -> dict[str, Any]:
    """One message; `where` names it in errors."""
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content", param=where)
    checked: dict[str, Any] = {}
    for field, value in message.items():
        place = f"{where}.{shorten(str(field), 64)}"
        if field == "role":
            if value not in ROLES:
                raise RequestError(f"{place} must be one of {', '.join(ROLES)}", param=place)
            checked["role"] = value
        elif field == "content":
            checked["content"] = content_text(value, place, max_parts)
        elif field == "name":
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{place} must be a string", param=place)
            if value is not None:
                checked["name"] = value
        elif field in NOT_YET:
            if value:
                raise RequestError(f"{place} is not supported", param=place, code="unsupported")
        elif field not in WITHOUT_EFFECT:
            raise RequestError(f"{place} is unknown", param=place, code="unknown_parameter")
    for field in ("role", "content"):
        if field not in checked:
            raise RequestError(f"{where} has no {field}", param=f"{where}.{field}")
    return checked


def content_text(content: Any, where: str, max_parts: int) -> str:
    """The text of a message: a string, or a list of `{"type": "text", "text": …}`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
    if len(content) > max_parts:
        raise RequestError(
            f"{where} has {len(content)} parts; at most {max_parts} are allowed", param=where
        )
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            named = shorten(repr(kind), 64)
            raise RequestError(
                f"{where}[{at}] has type {named}; this model reads only parts of type 'text'",
                param=f"{where}[{at}]",
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{at}].text must be a string", param=f"{where}[{at}].text")
        texts.append(part["text"])
    return "\n".join(texts)


def as_system(role: str) -> str:
    """`role`, with the developer's role as the system's."""
    return "system" if role == "developer" else role


def environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with the names that chat templates rely on."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return sandbox


def raise_exception(message: str) -> None:
    """What templates call to refuse messages."""
    raise TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: Jinja's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def find_template(directory: str | Path, override: str | None = None) -> str | None:
    """The source of a checkpoint's chat template, or None.

    In order: `override`, a file or the name of one of the checkpoint's templates;
    `chat_template.jinja`; `chat_template.json`; `chat_template` in `tokenizer_config.json`. Of
    several named templates the one called "default" is taken. Raises StartupError naming the file
    that cannot be read, and where there is none to take.
    """
    where = Path(directory)
    if override is not None:
        path = Path(override).expanduser()
        named = {} if path.is_file() else own_templates(where)
        return named[override] if override in named else read_template(path, named)
    templates = own_templates(where)
    if templates and "default" not in templates:
        raise StartupError(
            f"{where} has several chat templates, {', '.join(templates)}, and none is the default; "
            "choose one with --chat-template NAME"
        )
    return templates.get("default")


def own_templates(directory: Path) -> dict[str, str]:
    """The checkpoint's templates by name; one without a name is "default"."""
    if (directory / "chat_template.jinja").is_file():
        return {"default": read_template(directory / "chat_template.jinja")}
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        found = read_json(path).get("chat_template")
        if isinstance(found, list):
            found = named_templates(found, path)
        if isinstance(found, str):
            found = {"default": found}
        if isinstance(found, dict) and all(isinstance(source, str) for source in found.values()):
            return found
        if found is not None:
            raise StartupError(f"chat_template in {path} must be text, or texts by name")
    return {}


def read_template(path: Path, named: Iterable[str] = ()) -> str:
    """The text of a template's file. Raises StartupError naming it, and what `named` there was."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 at byte {error.start}"
    names = f"; templates of the checkpoint by name: {', '.join(named)}" if named else ""
    raise StartupError(f"the chat template {path} cannot be read: {reason}{names}")


def named_templates(entries: list[Any], path: Path) -> dict[str, Any]:
    """Templates by name, of a list of `{"name": …, "template": …}`. Raises StartupError."""
    try:
        return {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError) as error:
        raise StartupError(
            f"chat_template in {path} must be a list of objects with name and template"
        ) from error


def load_text(
    directory: str | Path,
    *,
    chat_template: str | None = None,
    class_defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Tokenizer, ChatTemplate | None]:
    """Tokenizer and chat template of the checkpoint in `directory`.

    `chat_template` is a file to use instead of the checkpoint's own; `class_defaults` as in
    `Tokenizer.from_directory`. Raises StartupError.
    """
    loaded = Tokenizer.from_directory(directory, class_defaults)
    template = find_template(directory, chat_template)
    if template is None:
        return loaded, None
    try:
        return loaded, ChatTemplate(template, loaded.special_tokens)
    except StartupError as error:
        where = chat_template or directory
        raise StartupError(
            f"{error.message}; it is from {where}; give another with --chat-template FILE"
        ) from error
