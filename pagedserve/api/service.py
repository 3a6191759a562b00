"""What all routes share: the engine client, the tokenizer, the phase, and the answers under way.

The service starts in the background while the port already answers, and says at any time whether it
takes requests and why not. It belongs to the event loop's thread; only the checks of a request may
be called from others: they read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable

from pagedserve import logs
from pagedserve.api import checkpoint
from pagedserve.api.admission import Admission, Tenant, Visit
from pagedserve.api.answer import Answer
from pagedserve.api.checkpoint import TextSide
from pagedserve.api.metrics import Metrics
from pagedserve.api.startup import Startup
from pagedserve.api.threads import in_daemon_thread
from pagedserve.config import DEMO_MODEL, Config
from pagedserve.engine.channel import Progress, Ready
from pagedserve.engine.client import EngineClient
from pagedserve.engine.watch import TICK_SECONDS, Silence
from pagedserve.errors import (
    ContextLengthExceeded,
    PagedServeError,
    StartupError,
    UnavailableError,
)
from pagedserve.limits import Limits
from pagedserve.models.generation_config import GenerationConfig
from pagedserve.request import Request, SamplingParams, check_prompt, check_vocabulary, choice_seed
from pagedserve.text.chat import ChatTemplate
from pagedserve.text.deltas import TextStream
from pagedserve.text.tokenizer import Tokenizer

log = logging.getLogger("pagedserve")
requests_log = logging.getLogger(logs.REQUESTS)

MAX_LOGGED_TOKENS = 2048  # of a prompt
INLINE_BYTES = 4096  # the text of bodies up to here is tokenised faster than a thread is reached


class Service:
    """One served model. `phase` is "ready" only while requests are taken.

    `startup` is what the start is doing, or did last; `failure` is done, with the cause, once this
    service can do nothing any more.
    """

    def __init__(self, config: Config, client: EngineClient):
        self.config = config
        self.limits = Limits.of(config.server.limits)
        self.client = client
        self.model_name = served_name(config)
        self.admission = Admission(config.server)
        self.metrics = Metrics(self.model_name, self.admission)
        self.started_at = time.monotonic()
        self.created = int(time.time())
        self.draining = False
        self.answers: set[Answer] = set()
        self.failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.on_phase: Callable[[str, str], None] = lambda phase, detail: None
        self.text: TextSide | None = None
        self.startup = Startup()
        self._silence = Silence(time.monotonic())  # of our own half of the start
        self._told_silent = False
        self._ready = asyncio.Event()
        self._ticking: asyncio.TimerHandle | None = None

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load tokenizer and engine; returns when requests are taken. Failures end in `failure`."""
        self.client.on_progress = self._progress
        self.client.on_unsent = self._flush_later
        self.client.on_down = self._engine_down
        self.client.on_up = self._listen
        self._listen()
        self._tick_later()
        try:
            await self._load()
        except StartupError as error:
            self._fail(error.message)
        except Exception as error:
            log.exception("the start failed")
            self._fail(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """End what still runs, with an error that says so."""
        for answer in list(self.answers):
            answer.fail(UnavailableError("the server is shutting down", code="shutting_down"))
        self._stop_listening()
        if self._ticking is not None:
            self._ticking.cancel()

    @property
    def phase(self) -> str:
        """One of "loading", "ready", "stalled", "restarting", "draining" and "dead"."""
        if self.failure.done():
            return "dead"
        if self.draining:
            return "draining"
        if self.client.restarting:
            return "restarting"
        if self.ready is None:
            return "loading"
        return "stalled" if self.client.silent else "ready"

    @property
    def ready(self) -> Ready | None:
        """What the engine reported, once the tokenizer is loaded too."""
        return self.client.ready if self.text is not None else None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, once it is loaded."""
        return self.text.tokenizer if self.text is not None else None

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template, where there is one."""
        return self.text.template if self.text is not None else None

    @property
    def generation(self) -> GenerationConfig:
        """What a request gets for what it leaves out."""
        assert self.text is not None, "a request before the start has ended"
        return self.text.generation

    def check_available(self) -> Ready:
        """Raise UnavailableError with the phase or the cause unless requests are taken."""
        if self.failure.done():
            raise UnavailableError(f"the server is dead: {self.failure.result()}", code="dead")
        if self.draining:
            raise UnavailableError("the server is shutting down", code="draining")
        if self.ready is None:
            raise UnavailableError(f"the model is loading: {self.startup.text}", code="loading")
        return self.ready

    async def _load(self) -> None:
        if self.config.model.skip_tokenizer_init:
            raise StartupError("skip_tokenizer_init is for the offline LLM; HTTP speaks text")
        self._enter("finding the model")
        loop = asyncio.get_running_loop()

        def report(phase: str, detail: str, done: int = 0, total: int = 0) -> None:
            # From the thread, which may outlive the loop.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._enter, phase, detail, done, total)

        text = await in_daemon_thread(checkpoint.load, self.config.model, report)
        options = self.config.to_builtins() | text.engine_options() | {"api_key": None}
        self.client.configure(options)
        if self.client.ready is None:
            await self._ready.wait()
        assert self.client.ready is not None
        self.admission.settle(self.client.ready)
        self.text = text

    def _enter(self, phase: str, detail: str = "", done: int = 0, total: int = 0) -> None:
        self.startup.enter(phase, detail, done, total)
        self._silence.heard()
        self.on_phase(phase, detail)

    def _progress(self, message: Progress | Ready) -> None:
        if isinstance(message, Ready):
            if self._ready.is_set():
                self.admission.settle(message)  # memory may have become less
                self._enter("ready again", f"{self.client.num_live} sequences go on")
            self._ready.set()
        else:
            self._enter(message.phase, message.detail, message.bytes_done, message.bytes_total)

    def _readable(self) -> None:
        self.client.poll()
        self._look()

    def _tick(self) -> None:
        """Let the client see time pass: stalls, and the moment of a restart."""
        try:
            self.client.tick()
            self._watch_own_half()
            self._tell_silence()
            self._look()
        finally:  # a bug in one answer must not end the watch over all
            if not self.failure.done():
                self._tick_later()

    def _tell_silence(self) -> None:
        """A line when the engine falls silent, and one when it speaks again."""
        if self.client.silent != self._told_silent:
            self._told_silent = self.client.silent
            if self._told_silent:
                self._enter("stalled:", "the engine gives no sign of life; not ready until it does")
            elif not self.client.restarting:
                self._enter("ready again", "the engine gives signs of life")

    def _watch_own_half(self) -> None:
        """End a start that hangs before the engine has its configuration: a dead file system."""
        self._silence.look(time.monotonic(), stopped=False)
        limit = self.config.server.load_timeout
        if not self.client.configured and limit and self._silence.seconds > limit:
            self._fail(
                f"the start made no progress for {limit:g} s while it read the files of "
                f"{self.config.model.model}; look whether their file system answers"
            )

    def _tick_later(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def _look(self) -> None:
        client, metrics = self.client, self.metrics
        metrics.stats, metrics.last_death = client.stats, client.last_death
        metrics.engine_restarts, metrics.quarantined = client.num_restarts, client.num_quarantined
        if client.cause_of_death is not None:
            self._fail(client.cause_of_death)

    def _engine_down(self, cause: str) -> None:
        self._stop_listening()
        waiting = f"{self.client.num_live} sequences wait for it"
        self._enter(f"engine died: {cause}; restarting it, {waiting}")

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self.client.fileno(), self._readable)

    def _stop_listening(self) -> None:
        loop, fd = asyncio.get_running_loop(), self.client.fileno()
        if fd >= 0:  # else it is closed, and this was done before
            loop.remove_reader(fd)
            loop.remove_writer(fd)

    def _fail(self, cause: str) -> None:
        self._stop_listening()
        if not self.failure.done():
            self.failure.set_result(cause)

    def _flush_later(self) -> None:
        """Push out what the socket would not take, when it will."""
        loop, fd = asyncio.get_running_loop(), self.client.fileno()

        def writable() -> None:
            self.client.flush()
            if not self.client.unsent:
                loop.remove_writer(fd)

        loop.add_writer(fd, writable)

    # -- requests --------------------------------------------------------------------------------

    def check_chars(self, texts: list[str], *, param: str) -> None:
        """Raise ContextLengthExceeded where one of `texts` cannot fit, before any is tokenised."""
        ready, tokenizer = self.check_available(), self.tokenizer
        assert tokenizer is not None
        # Twice, because a normaliser may shorten text; only long runs of spaces it shortens more.
        most_chars = 2 * tokenizer.longest_token * ready.max_model_len
        longest = max(map(len, texts), default=0)
        if longest > most_chars:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {ready.max_model_len} tokens, which "
                f"{longest} characters cannot fit. Shorten the prompt.",
                param=param,
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. May run in a thread."""
        assert self.tokenizer is not None
        return self.tokenizer.encode(text, add_special_tokens)

    def check(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        param: str,
        usual_tokens: int,
        least_tokens: int = 0,
    ) -> SamplingParams:
        """`params` settled for `prompt`. Raises RequestError where either is unfit.

        `usual_tokens`: how many tokens are written at most where `params` leave it open, or as many
        as the context holds, if those are fewer. `least_tokens`: the default of `min_tokens`, of
        which no more is kept than fits.
        """
        ready = self.check_available()
        check_vocabulary(params, ready.vocab_size)
        settled = check_prompt(
            prompt,
            params,
            vocab_size=ready.vocab_size,
            max_model_len=ready.max_model_len,
            param=param,
        )
        most = settled.max_tokens
        assert most is not None, "check_prompt settles max_tokens"
        if params.max_tokens is None:
            most = min(most, usual_tokens)
            settled = settled.replace(max_tokens=most)
        if least_tokens:
            settled = settled.replace(min_tokens=min(least_tokens, most))
        return settled

    def submit(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        visit: Visit,
        *,
        priority: int = 0,
    ) -> Answer:
        """Send checked prompts to the engine, `n` sequences each; the caller closes the answer.

        Sequence `i * n + j` is choice j of prompt i. The same seed gives prompt i's choice j the
        same text whatever the other prompts are. Raises BusyError where the queue is full,
        DeadlineError where the visit's time is over already.
        """
        self.check_available()
        self.admission.check_time(visit)
        lengths = [
            len(prompt)
            for prompt, wanted in zip(prompts, params, strict=True)
            for _ in range(wanted.n)
        ]
        self.admission.admit(visit.tenant, lengths)
        # From here on every sequence has a sink, which counts its end.
        answer = Answer(self.client, self.metrics, self.answers.discard, self.admission, visit)
        requests: list[Request] = []
        for prompt, wanted in zip(prompts, params, strict=True):
            for index in range(wanted.n):
                seed = wanted.seed
                seed = secrets.randbits(63) if seed is None else choice_seed(seed, index)
                requests.append(
                    Request(
                        self.client.next_id(),
                        prompt,
                        wanted,
                        seed,
                        priority,
                        answer.arrival,
                        tenant=visit.tenant.id,
                        weight=visit.tenant.weight,
                        deadline=visit.deadlines.next(computed=False, written=False),
                        cache_salt=self.cache_salt(visit.tenant),
                    )
                )
        if self.config.server.log_prompts:
            self._log_prompts(visit, prompts, params)
        sinks = [answer.add(each, self._stream(each)) for each in requests]
        self.answers.add(answer)
        try:
            self.client.submit(requests, sinks)
        except PagedServeError:
            answer.close()
            raise
        answer.keep_time()
        return answer

    def _log_prompts(
        self, visit: Visit, prompts: list[list[int]], params: list[SamplingParams]
    ) -> None:
        assert self.tokenizer is not None
        for prompt, wanted in zip(prompts, params, strict=True):
            text = self.tokenizer.decode(prompt[:MAX_LOGGED_TOKENS], skip_special_tokens=False)
            requests_log.info(
                "%s asks behind %d tokens: %r%s with %s",
                visit.tenant.name,
                len(prompt),
                text,
                "…" if len(prompt) > MAX_LOGGED_TOKENS else "",
                wanted,
            )

    def cache_salt(self, tenant: Tenant) -> str:
        """What keeps the prompts of one holder of keys from being found by another's."""
        return "" if self.config.server.share_prefix_cache else str(tenant.id)

    def _stream(self, request: Request) -> TextStream:
        return TextStream(self.tokenizer, request.params, request.prompt_token_ids)


def served_name(config: Config) -> str:
    """The name that clients use for the model."""
    model = config.model
    if model.served_model_name:
        return model.served_model_name
    return "pagedserve-demo" if model.model == DEMO_MODEL else model.model
