"""What a client asks for: the one bounded schema.

Every dialect (HTTP, offline `LLM`) builds these, and every limit on a request's *values* is checked
here and nowhere else, before anything is allocated: `SamplingParams` holds to what the engine has
room for, `check_within` to a server's own limits. The room knows no HTTP, no text and no model:
limits that depend on the model (vocabulary, context) are arguments of `check_prompt` and
`check_vocabulary`.
"""

from __future__ import annotations

import enum
import hashlib
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from pagedserve.errors import ContextLengthExceeded, RequestError
from pagedserve.limits import CEILING, Limits

MAX_TOKENS = 1 << 30  # far above any context; what fits is decided against the model's context

# name: (kind, lowest, highest). OpenAI's ranges where it has one, vLLM's where it has not.
BOUNDS: dict[str, tuple[type, float, float]] = {
    "n": (int, 1, CEILING.n),
    "temperature": (float, 0.0, 100.0),
    "top_p": (float, 0.0, 1.0),
    "top_k": (int, -1, 1 << 30),
    "min_p": (float, 0.0, 1.0),
    "presence_penalty": (float, -2.0, 2.0),
    "frequency_penalty": (float, -2.0, 2.0),
    "repetition_penalty": (float, 0.01, 10.0),
    "seed": (int, -(1 << 63), (1 << 63) - 1),
    "max_tokens": (int, 1, MAX_TOKENS),
    "min_tokens": (int, 0, MAX_TOKENS),
    "logprobs": (int, 0, CEILING.logprobs),
    "prompt_logprobs": (int, 0, CEILING.logprobs),
}
MAY_BE_NONE = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")


class FinishReason(enum.StrEnum):
    """Why a sequence ended. The first two are OpenAI's; the others never look like success."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How one request wants its tokens drawn. Names and defaults are vLLM's.

    `top_k` 0 or -1 means all tokens, `top_p` 0 keeps the likeliest one, `temperature` 0 is greedy.
    `max_tokens` None means as many as the context holds. `logprobs` k returns, for every output
    token, its own log-probability and those of the k likeliest; they are taken from the model's
    logits before any processor and before temperature.

    Numbers of any library are welcome and become Python's own: only those cross to the engine.
    Raises `RequestError` naming the parameter and the limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        set_ = msgspec.structs.force_setattr
        set_(self, "stop", plain_stops(self.stop))
        set_(self, "stop_token_ids", plain_stop_tokens(self.stop_token_ids))
        set_(self, "logit_bias", bias_by_token(self.logit_bias))
        for name, (kind, low, high) in BOUNDS.items():
            given = getattr(self, name)
            plain = check_number(name, given, kind, low, high)
            if plain is not given:
                set_(self, name, plain)
        for name in FLAGS:
            check_flag(name, getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens, which is {self.max_tokens}",
                param="min_tokens",
            )

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is always taken: seed and filters have no effect."""
        return self.temperature < 1e-5

    @property
    def penalised(self) -> bool:
        """True when tokens already seen change the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def replace(self, **changes: Any) -> SamplingParams:
        """A checked copy with `changes`."""
        return msgspec.structs.replace(self, **changes)


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to write, as it crosses from the API process to the engine: immutable, once.

    `seed` is always set: with the position it keys every random draw, so the same request gives the
    same tokens whatever shares its batch, and a replay continues the same text. `priority`: lower
    first. `arrival`, and the `deadline` of its start: `time.monotonic()` seconds of the machine.
    `tenant` is whose it is, `weight` that tenant's share against the others'. Prompt beginnings are
    found in the prefix cache only where `cache_salt` is the same.

    A request that goes on after its engine died brings the tokens it has `written` already, which
    are part of its answer and not of its prompt, and the number of prompt log-probabilities that
    were received (`num_scored`): neither is sent again.
    """

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0
    arrival: float = 0.0
    written: list[int] = []
    num_scored: int = 0
    tenant: int = 0
    weight: float = 1.0
    deadline: float = math.inf
    cache_salt: str = ""


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request with `seed`: its own for the first, then derived."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits, as drawn seeds have


def check_number(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    """`value` as a plain `kind`, int or float (or None, where allowed).

    Raise unless it is a finite number of that kind in [low, high].
    """
    if value is None and name in MAY_BE_NONE:
        return None
    value = plain_number(name, value, kind)
    if not low <= value <= high:  # NaN compares false
        given = value if -1e30 < value < 1e30 or value != value else "a number far outside"
        raise RequestError(f"{name} must be between {low} and {high}, got {given}", param=name)
    return kind(value)  # last: an integer far outside is no float


def plain_number(name: str, value: Any, kind: type) -> Any:
    """`value`, as an int where `kind` is int. Raise for what is none, booleans among them."""
    if type(value) is kind:
        return value
    if kind is int and (index := plain_index(value)) is not None:
        return index
    if kind is float and type(value) is not bool and isinstance(value, numbers.Real):
        return value
    word = "an integer" if kind is int else "a number"
    raise RequestError(f"{name} must be {word}, got {type(value).__name__}", param=name)


def plain_index(value: Any) -> int | None:
    """`value` as Python's own int if it is an integer of any library; None if not, or a bool."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be True or False, got {type(value).__name__}", param=name)


def plain_list(name: str, given: Any) -> list[Any]:
    """`given` as a list: of a sequence or an array of any library, its elements Python's own."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a list, got {type(given).__name__}", param=name)
    return list(values)


def plain_token_ids(name: str, given: Any) -> list[int]:
    """`given` as a list of plain ints. Raise, naming `name`, for anything but integers."""
    ids = plain_list(name, given)
    if are_plain_ints(ids):
        return ids
    plain = []
    for at, id in enumerate(ids):
        if (index := plain_index(id)) is None:
            raise RequestError(
                f"{name} must be integers; at {at} there is one of type {type(id).__name__}",
                param=name,
            )
        plain.append(index)
    return plain


def are_plain_ints(ids: Iterable[Any]) -> bool:
    """True when all are Python's own integers; 30 ns each."""
    return set(map(type, ids)) <= {int}


def plain_stops(stop: Any, limits: Limits = CEILING) -> list[str]:
    """Stop strings as a list. Raise unless there are few and each is short and can be UTF-8."""
    if stop is None:
        return []
    # a single string is welcome, and becomes a list of one
    stops = [stop] if isinstance(stop, str) else plain_list("stop", stop)
    check_count("stop", len(stops), "strings", limits.stop_strings)
    return [plain_stop(text, limits.stop_chars) for text in stops]


def plain_stop(text: Any, max_chars: int) -> str:
    """One stop string, checked; as Python's own str, which some libraries derive from."""
    if not isinstance(text, str) or not 0 < len(text) <= max_chars:
        raise RequestError(
            f"each stop must be a string of 1 to {max_chars} characters", param="stop"
        )
    try:
        return text.encode().decode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"stop {ascii(text)} holds half of a surrogate pair, which no text has", param="stop"
        ) from error


def plain_stop_tokens(given: Any, limits: Limits = CEILING) -> list[int]:
    """Stop token ids as plain ints. Raise unless there are few."""
    if given is None:
        return []
    ids = plain_list("stop_token_ids", given)
    check_count("stop_token_ids", len(ids), "entries", limits.stop_token_ids)
    return plain_token_ids("stop_token_ids", ids)


def bias_by_token(bias: Any, limits: Limits = CEILING) -> dict[int, float]:
    """OpenAI's `{"token id": bias}` with integer keys, few entries and values in [-100, 100]."""
    bias = {} if bias is None else bias
    if not isinstance(bias, Mapping):
        raise RequestError("logit_bias must map token ids to numbers", param="logit_bias")
    check_count("logit_bias", len(bias), "entries", limits.bias_entries)
    checked: dict[int, float] = {}
    for key, value in bias.items():
        token = bias_token(key)
        if token in checked:
            raise RequestError(f"logit_bias names token {token} twice", param="logit_bias")
        checked[token] = check_number("logit_bias", value, float, -100.0, 100.0)
    return checked


def bias_token(key: Any) -> int:
    """The token id that a key of `logit_bias` names: an integer, or its digits as JSON has it."""
    if isinstance(key, str):
        # isdecimal alone is true of every script's digits; ten digits are past any vocabulary
        token = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else None
    else:
        token = plain_index(key)
    if token is None:
        raise RequestError("the keys of logit_bias must be token ids", param="logit_bias")
    return token


def check_count(name: str, count: int, what: str, most: int) -> None:
    """Raise where parameter `name` has more than `most` of `what`."""
    if count > most:
        raise RequestError(f"{name} has {count:d} {what}, at most {most} are allowed", param=name)


def check_within(given: Mapping[str, Any], limits: Limits) -> None:
    """Raise RequestError where one of the fields `given` of SamplingParams is past `limits`."""
    most = {"n": limits.n, "logprobs": limits.logprobs, "prompt_logprobs": limits.logprobs}
    for name, high in most.items():
        if name in given:
            check_number(name, given[name], int, BOUNDS[name][1], high)
    plain_stops(given.get("stop"), limits)
    plain_stop_tokens(given.get("stop_token_ids"), limits)
    bias_by_token(given.get("logit_bias"), limits)


def check_num_sequences(total: int, limits: Limits) -> None:
    """Raise RequestError for a request of too many sequences."""
    if total > limits.sequences:
        raise RequestError(
            f"prompts times n is {total}; at most {limits.sequences} are allowed", param="n"
        )


def check_prompt_tokens(total: int, limits: Limits, *, param: str) -> None:
    """Raise RequestError where the prompts of all sequences of a request are too long together."""
    if total > limits.prompt_tokens:
        raise RequestError(
            f"prompt tokens times n are more than {limits.prompt_tokens}, the most that is allowed "
            "in one request. Send fewer prompts in one, or lower n.",
            param=param,
        )


def most_tokens(params: SamplingParams, num_sequences: int, limits: Limits) -> int:
    """How many tokens each of a request's sequences may write. Raises RequestError for more."""
    most = limits.answer_tokens // num_sequences
    if params.logprobs is not None:
        most = min(most, limits.logprob_entries // (num_sequences * (params.logprobs + 1)))
    if (params.max_tokens or 1) > most:
        raise RequestError(
            f"max_tokens may be {most} at most in a request of {num_sequences} sequences (prompts "
            f"times n) with {'no' if params.logprobs is None else params.logprobs} logprobs, got "
            f"{params.max_tokens or 'none, which is one at least'}",
            param="max_tokens",
        )
    return most


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raise where `params` names a token id outside [0, vocab_size)."""
    for name in ("logit_bias", "stop_token_ids"):
        for token in getattr(params, name):
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"{name} names token {token}; the vocabulary is 0 to {vocab_size - 1}",
                    param=name,
                )


def check_prompt(
    token_ids: Sequence[int],
    params: SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
    param: str = "prompt",
) -> SamplingParams:
    """Check a tokenised prompt against the model; return `params` with `max_tokens` settled.

    `param` is the dialect's name of the prompt ("messages" for chat). Raises `RequestError` for an
    empty prompt, a token id that is no plain int (see `plain_token_ids`) or outside the vocabulary,
    `ContextLengthExceeded` when the prompt, or the prompt and `max_tokens` together, do not fit
    `max_model_len` (tokens).
    """
    if not token_ids:
        raise RequestError(f"{param} is empty; give at least one token", param=param)
    room = max_model_len - len(token_ids)
    if room < 1:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens; the prompt has "
            f"{len(token_ids)}, which leaves no room for an answer. Shorten the prompt.",
            param=param,
        )
    if not are_plain_ints(token_ids):
        raise RequestError(f"{param} must be token ids, all of them integers", param=param)
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise RequestError(
            f"{param} holds token id {bad}; the vocabulary is 0 to {vocab_size - 1}", param=param
        )
    if params.max_tokens is None:
        return params.replace(max_tokens=room)
    if params.max_tokens > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens; you asked for "
            f"{len(token_ids) + params.max_tokens} ({len(token_ids)} in the prompt, "
            f"{params.max_tokens} in max_tokens). Reduce either.",
            param="max_tokens",
        )
    return params
