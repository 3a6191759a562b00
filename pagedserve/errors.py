"""Every error this project raises on purpose, as one tree.

    PagedServeError                 500  something of ours
    ├── RequestError                400  the client's mistake: names parameter, limit, way out
    │   ├── ContextLengthExceeded   400
    │   ├── AuthenticationError     401
    │   ├── ForbiddenError          403
    │   ├── NotFoundError           404
    │   └── BodyTooLarge            413
    ├── BusyError                   429  more than is allowed at a time; says when to come again
    ├── DeadlineError               504  it took longer than the server allows; 408: the client
    ├── UnavailableError            503  not now: loading, draining or dead; says which
    ├── StepError                   500  one step could not be computed, and the device is sound
    └── StartupError                 –   cannot start: bad flag, bad checkpoint, no memory

An error knows its HTTP status and the body of the OpenAI error object. A broken invariant of our
own is an `assert`, not a member of this tree.
"""

from __future__ import annotations

import re

MAX_MESSAGE_CHARS = 1024
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}\b")
FOLDERS = re.compile(r"(?<![\w./:])(?:~|[A-Za-z]:)?[/\\](?:[\w.@+~-]+[/\\])+")


class PagedServeError(Exception):
    """Root of the tree. `status` is the HTTP status, `type` and `code` go into the error object."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = shorten(message)
        self.param = param
        self.code = code or type(self).code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object: `{"error": {"message", "type", "param", "code"}}`."""
        # What the client did wrong is told in our words; what went wrong here may be in anybody's.
        return {
            "error": {
                "message": self.message if self.status < 500 else without_places(self.message),
                "type": self.type,
                "param": self.param and self.param[:256],
                "code": self.code,
            }
        }


class RequestError(PagedServeError):
    """The request cannot be served as it stands; nothing was allocated for it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(RequestError):
    """Prompt, or prompt plus what was asked for, is longer than the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(RequestError):
    """No API key, or a wrong one."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The key does not reach so far, or the request came from where none may come from."""

    status = 403
    code = "permission_denied"


class NotFoundError(RequestError):
    """A model or a route that does not exist here."""

    status = 404
    code = "model_not_found"


class BodyTooLarge(RequestError):
    """The HTTP body is longer than the server's limit."""

    status = 413
    code = "body_too_large"


class BusyError(PagedServeError):
    """More than the server, or the client's quota, takes now. `retry_after`: seconds to wait."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int, code: str | None = None):
        super().__init__(message, code=code)
        self.retry_after = retry_after


class DeadlineError(PagedServeError):
    """A request's time is over. 408 where the client set it, 504 where the server did."""

    status = 504
    type = "timeout_error"
    code = "timeout"

    def __init__(self, message: str, *, code: str, by_client: bool = False):
        super().__init__(message, code=code)
        self.by_client = by_client
        if by_client:
            self.status = 408


class UnavailableError(PagedServeError):
    """The server cannot take requests now; the message says the phase or the cause of death."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"


class StepError(PagedServeError):
    """A step broke off; what it left behind is cleared, and it, or parts of it, may be tried again.

    `memory`: for want of memory, so that less at a time may do.
    """

    code = "step_failed"

    def __init__(self, message: str, *, memory: bool = False):
        super().__init__(message)
        self.memory = memory


class StartupError(PagedServeError):
    """The server cannot start; the message says what was found and what to do."""

    code = "startup_failed"


def without_places(text: str) -> str:
    """`text` without memory addresses and the folders of paths, for who is not the operator.

    The names of files stay: they say what is wrong and not where it is.
    """
    return FOLDERS.sub("…/", ADDRESS.sub("0x…", text))


def shorten(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """`text` cut to `limit` characters: an error body stays under 4 KiB whatever came in."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
