"""One sequence's engine tokens become Deltas: what every dialect renders.

A streamed answer sends the Deltas, an answer in one piece concatenates them: the two cannot differ.
The room knows no HTTP and no engine; tokens are pushed in, and the caller looks at `finish_reason`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagedserve.request import FinishReason, SamplingParams
from pagedserve.step import TokenLogprobs
from pagedserve.text.detokenizer import Detokenizer, detokenizer
from pagedserve.text.stops import StopMatcher
from pagedserve.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Delta:
    """A piece of one sequence's answer.

    `logprobs` and `offsets` are parallel to `token_ids` where log-probabilities were asked for,
    else empty. An offset is the number of characters of the answer before the token's text.
    `stop_reason` is the stop string or stop token id that ended the answer; None for the model's
    own end token. A Delta's text may be empty while text is held back.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    offsets: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextStream:
    """Detokenising, stop strings and the finish reason of one sequence.

    The text is what the answer adds to that of `prompt`, the ids before it. Without a tokenizer, or
    with `detokenize` off, all text is empty. A token that ends the answer
    is counted and listed but writes no text, unless `include_stop_str_in_output`.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, params: SamplingParams, prompt: Sequence[int] = ()
    ):
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._stop_token_ids = params.stop_token_ids
        self._wants_logprobs = params.logprobs is not None
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = detokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens, after=prompt
            )
        self._stops = StopMatcher(params.stop, include=self._include) if params.stop else None
        self._num_chars = 0
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def push(
        self,
        token_id: int,
        logprobs: TokenLogprobs | None = None,
        finish_reason: str | None = None,
        stop_token: int | None = None,
    ) -> Delta:
        """Take the next token; `finish_reason` and `stop_token` are the engine's, on the last one.

        When the Delta ends the answer though the engine did not, a stop string was found, and the
        caller aborts the request.
        """
        assert self.finish_reason is None, "a token after the end of its answer"
        self.num_tokens += 1
        offset = self._num_chars
        text = self._written(token_id, finish_reason)
        self._num_chars += len(text)
        stop_reason: str | int | None = None
        if stop_token is not None and stop_token in self._stop_token_ids:
            stop_reason = stop_token
        if self._stops is not None and self.num_tokens > self._min_tokens:
            text = self._stops.push(text)
            if self._stops.matched is not None:
                finish_reason, stop_reason = FinishReason.STOP.value, self._stops.matched
            elif finish_reason is not None:
                text += self._stops.finish()
        self.finish_reason = finish_reason
        wanted = self._wants_logprobs and logprobs is not None
        return Delta(
            text,
            [token_id],
            [logprobs] if wanted and logprobs is not None else [],
            [offset] if wanted else [],
            finish_reason,
            stop_reason,
        )

    def _written(self, token_id: int, finish_reason: str | None) -> str:
        """The text that `token_id` makes certain."""
        if self._detokenizer is None:
            return ""
        hidden = finish_reason == FinishReason.STOP and not self._include
        text = "" if hidden else self._detokenizer.push(token_id)
        if finish_reason is not None:
            text += self._detokenizer.finish()
        return text
