"""What is written to the log: no key in any form, no long quotation in a traceback."""

from __future__ import annotations

import hashlib
import logging
import random
import string
import subprocess
import sys
from collections.abc import Callable

import pytest

from pagedserve import logs
from pagedserve.logs import HIDDEN, Redacting, redacted, without_query

SECRETS = ["sk-3kXq_81-Zp", "key/with+odd=chars.", "sécret-ключ", "a:b?c&d", "q7"]
KNOWN = frozenset(hashlib.sha256(each.encode()).digest() for each in SECRETS)


def known(digest: bytes) -> bool:
    return digest in KNOWN


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "line",
    [
        "{}", "key {} was wrong", "'{}'", '"{}"', "b'{}'", "({})", "[{}]", "<{}>", "key={}",
        "key: {}.", "{},{}", "http://h/p?key={}&x=1", "GET /v1/{}/x HTTP/1.1", "{{'k': '{}'}}",
        "tab\t{}\n{}", "é{{{}}}", "a={};b={}",
    ],
)  # fmt: skip
def test_a_key_is_hidden_wherever_it_stands(line: str, secret: str) -> None:
    text = line.replace("{{", "{").replace("}}", "}").replace("{}", secret)
    hidden = redacted(text, known)
    assert hidden == text.replace(secret, HIDDEN)


def test_what_is_no_key_stays() -> None:
    text = "sk-3kXq_81-Zp2 xx key/with+odd=char GET /v1/models?x2 took 3.5 s, 7 tokens; don't"
    assert redacted(text, known) == text
    assert redacted("sk-3kXq%5F81%2dZp", known) == HIDDEN  # in a URL


def test_random_keys_in_random_lines(capsys: pytest.CaptureFixture[str]) -> None:
    r = random.Random(11)
    letters = string.ascii_letters + string.digits + "-_.~+/="
    for _ in range(200):
        key = "".join(r.choices(letters, k=r.randint(20, 60)))
        digest = hashlib.sha256(key.encode()).digest()
        before = "".join(r.choices(string.printable[:95], k=r.randint(0, 40)))
        line = f"{before} '{key}' {before}"
        assert key not in redacted(line, {digest}.__contains__)


@pytest.mark.parametrize(
    "line",
    [
        "Authorization: Bearer hunter22", "authorization: hunter22", "'Authorization': 'hunter22'",
        "(b'authorization', b'Bearer hunter22')", '"Authorization": "Basic hunter22"',
        "Proxy-Authorization: Basic hunter22", "bearer hunter22", "AUTHORIZATION=hunter22",
        "headers={'authorization': 'Bearer hunter22', 'host': 'x'}",
    ],
)  # fmt: skip
def test_credentials_are_hidden_though_nobody_knows_them(line: str) -> None:
    hidden = redacted(line)
    assert "hunter22" not in hidden and HIDDEN in hidden
    assert redacted("the authorization failed, bearer in mind").startswith("the authorization f")


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("x", logging.ERROR, "f.py", 1, message, args, info)


def raised(make: Callable[[], BaseException]) -> BaseException:
    try:
        raise make()
    except BaseException as error:
        return error


def test_a_record_is_clean_in_its_arguments_and_its_traceback() -> None:
    error = raised(lambda: ValueError("bad header Bearer hunter22 of sk-3kXq_81-Zp"))
    error.__cause__ = raised(lambda: KeyError("sk-3kXq_81-Zp"))
    made = record("%s failed with %r", "sk-3kXq_81-Zp", {"k": "a:b?c&d"}, error=error)
    text = Redacting("%(message)s", known).format(made)
    for secret in (*SECRETS[:1], "a:b?c&d", "hunter22"):
        assert secret not in text
    assert "ValueError: bad header" in text and text.count("Traceback") == 2
    # and where another formatter has formatted it before, and kept what it made
    made = record("again", error=error)
    logging.Formatter().format(made)
    assert "hunter22" not in Redacting("%(message)s", known).format(made)


def test_a_traceback_quotes_little_unless_prompts_are_logged() -> None:
    prompt = "Dear doctor, since last week I have had a pain in my left knee. " * 40
    for form in ("{!r}", '"{}"', "in 'x' of {!r} and more", "{!r}" * 3):
        error = raised(lambda form=form: RuntimeError(form.format(prompt, prompt, prompt)))
        quiet = Redacting("%(message)s").format(record("failed", error=error))
        assert "knee" not in quiet and "RuntimeError" in quiet
        assert "test_logs.py" in quiet  # where it happened stays
        loud = Redacting("%(message)s", quote=True).format(record("failed", error=error))
        assert prompt in loud
    cached = record("failed", error=error)
    logging.Formatter().format(cached)  # another handler was first, and left what it made
    assert "knee" not in Redacting("%(message)s").format(cached)
    short = raised(lambda: KeyError("max_tokens"))
    assert "KeyError: 'max_tokens'" in Redacting("%(message)s").format(record("x", error=short))


def test_a_line_of_many_quotes_is_read_in_time() -> None:
    for line in ("'" * 100_000, "'\\" * 100_000, "'a\"" * 100_000):
        assert len(logs.without_quotations(line)) <= logs.MAX_LINE_CHARS + 1
    for line in ("a." * 500_000, "%61" * 500_000, "authorization: " * 100_000, "bearer " * 200_000):
        assert len(redacted(line, known)) <= 2 * logs.MAX_CHARS


def test_a_long_record_keeps_its_beginning_and_its_end() -> None:
    text = redacted("begin " + "word " * 100_000 + "the end", known)
    assert text.startswith("begin word") and text.endswith("word the end")


def test_an_access_line_has_no_query() -> None:
    made = record('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/v1/models?prompt=hi", "1.1", 200)
    assert without_query(made)
    assert made.getMessage() == '1.2.3.4:5 - "GET /v1/models HTTP/1.1" 200'
    long = record('"%s %s %s"', "c", "GET", "/" + "a." * 9000)
    assert without_query(long) and len(long.getMessage()) < 250
    odd = record("no access line")
    assert without_query(odd) and odd.getMessage() == "no access line"


CODE = """
import hashlib, logging, sys, warnings
from pagedserve import logs
digest = hashlib.sha256(b"my-key").digest()
with logs.to_standard_error(digest.__eq__, prompts=PROMPTS):
    logging.getLogger("pagedserve").warning("w %s", "my-key")
    logging.getLogger("pagedserve").info("not shown")
    logging.getLogger("asyncio").error("e %s", "Bearer abc")
    logging.getLogger(logs.REQUESTS).info("prompt %s", "my-key")
    try:
        raise KeyError("my-key")
    except KeyError:
        logging.getLogger("uvicorn.error").exception("x")
logging.getLogger(logs.REQUESTS).info("not shown either")
"""


@pytest.mark.parametrize("prompts", [False, True])
def test_every_logger_of_the_process_goes_through_it_once(prompts: bool) -> None:
    code = CODE.replace("PROMPTS", str(prompts))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = run.stderr.splitlines()
    wanted = [f"w {HIDDEN}", f"e Bearer {HIDDEN}", *([f"prompt {HIDDEN}"] if prompts else []), "x"]
    assert lines[: len(wanted)] == wanted
    assert lines[-1] == f"KeyError: '{HIDDEN}'" and "my-key" not in run.stderr
    assert "not shown" not in run.stderr and not run.stdout
