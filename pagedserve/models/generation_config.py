"""generation_config.json: the sampling that a model's makers advise, and the tokens that end it.

A request gets these values for what it leaves out. Values that this server has no counterpart of
are kept by name, to be shown: they are never dropped in silence. No torch here: the API process
reads the file, and the engine process gets the end tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagedserve.errors import RequestError, StartupError
from pagedserve.models.config_json import merged, read_json, shown
from pagedserve.request import SamplingParams

FILE = "generation_config.json"
OVERRIDE = "--override-generation-config"

# Theirs: ours.
APPLIED = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
DRAWING = ("temperature", "top_p", "top_k", "min_p")  # without effect where nothing is drawn

# What says nothing about how an answer is written: read elsewhere, or about another program.
ELSEWHERE = frozenset(
    (
        "eos_token_id",
        "do_sample",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_legacy_cache",
        "compile_config",
        "disable_compile",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "return_dict_in_generate",
        "trust_remote_code",
    )
)
# The values with which transformers' other parameters do nothing, besides null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "early_stopping": (False,),
    "length_penalty": (1,),  # of beams
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "token_healing": (False,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "stop_strings": ([],),
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What holds for a request that says nothing else.

    `defaults`: SamplingParams by name. `end_token_ids`: tokens that end an answer; `ends_chosen`
    is true where the user named them. `not_applied`: what the file asks for beyond that, by its own
    names. `source`: where it comes from, for people; empty where it comes from nowhere.
    """

    source: str
    defaults: dict[str, Any] = field(default_factory=dict)
    end_token_ids: list[int] = field(default_factory=list)
    ends_chosen: bool = False
    not_applied: dict[str, Any] = field(default_factory=dict)

    @property
    def max_tokens(self) -> int | None:
        """The default of `max_tokens`; None where there is none."""
        return self.defaults.get("max_tokens")

    @property
    def min_tokens(self) -> int:
        """The default of `min_tokens`."""
        return int(self.defaults.get("min_tokens", 0))

    def sampling_params(self, **given: Any) -> SamplingParams:
        """The defaults with what is `given`; the default of `min_tokens` is less where less fits.

        Raises RequestError.
        """
        fields = {**self.defaults, **given}
        least = fields.pop("min_tokens", 0)
        params = SamplingParams(**fields)
        if "min_tokens" not in given and params.max_tokens is not None:
            least = min(least, params.max_tokens)
        return params.replace(min_tokens=least)

    def without_text(self) -> GenerationConfig:
        """The same for who has no tokenizer: stop strings cannot be looked for."""
        if "stop" not in self.defaults:
            return self
        defaults = {name: value for name, value in self.defaults.items() if name != "stop"}
        not_applied = self.not_applied | {"stop_strings": self.defaults["stop"]}
        return dataclasses.replace(self, defaults=defaults, not_applied=not_applied)

    def ending_with(self, token_id: int | None) -> GenerationConfig:
        """The same with the tokenizer's end token too, unless the user chose the end tokens."""
        if token_id is None or self.ends_chosen or token_id in self.end_token_ids:
            return self
        return dataclasses.replace(self, end_token_ids=[*self.end_token_ids, token_id])

    def engine_options(self) -> dict[str, Any]:
        """Options that tell the engine process the same end tokens, without files."""
        ends = {"eos_token_id": self.end_token_ids}
        return {"generation_config": "none", "override_generation_config": ends}

    def lines(self) -> list[str]:
        """Lines for people."""
        lines = []
        if self.defaults:
            lines.append(f"sampling defaults: {listed(self.defaults)} ({self.source})")
        return lines + [line for line in [self.unapplied()] if line]

    def unapplied(self) -> str:
        """A line for people on what is not applied; empty where all is."""
        if not self.not_applied:
            return ""
        return f"not applied from {self.source}: {listed(self.not_applied)}"


def read(
    directory: Path,
    config: Mapping[str, Any],
    *,
    source: str = "auto",
    override: Mapping[str, Any] | None = None,
) -> GenerationConfig:
    """The generation config of the model in `directory`, whose config.json is `config`.

    `source` is "auto" for the model's own file, "none" for no file, or a directory with one;
    `override` is merged over it. End tokens are the file's, else those of config.json. Raises
    StartupError naming the file and the value that cannot be used.
    """
    path = file_of(directory, source)
    values = merged(read_json(path), override or {}) if path else dict(override or {})
    given = [OVERRIDE] if override else []
    where = " with ".join([str(path), *given] if path else given)
    ends, ends_in = values.get("eos_token_id"), where
    if ends is None:
        ends, ends_in = config.get("eos_token_id"), str(directory / "config.json")
    return GenerationConfig(
        source=where if source != "auto" else " with ".join([FILE, *given] if path else given),
        defaults=sampling_defaults(values, where),
        end_token_ids=token_ids(ends, ends_in),
        ends_chosen=(override or {}).get("eos_token_id") is not None,
        not_applied=not_applied(values),
    )


def file_of(directory: Path, source: str) -> Path | None:
    """The file to read, None where there is none. Raises StartupError for a missing one."""
    if source == "none":
        return None
    if source == "auto":
        path = directory / FILE
        return path if path.is_file() else None
    path = Path(source).expanduser() / FILE
    if not path.is_file():
        raise StartupError(
            f"--generation-config {source}: there is no file {path}; give auto, none or a "
            f"directory with {FILE}"
        )
    return path


def sampling_defaults(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """SamplingParams by name. `do_sample` false means the likeliest token, whatever else is said.

    Raises StartupError for a value that no request could have.
    """
    defaults = {
        ours: value
        for theirs, ours in APPLIED.items()
        if (value := values.get(theirs)) is not None and value not in NEUTRAL.get(theirs, ())
    }
    if values.get("do_sample") is False:
        defaults = {k: v for k, v in defaults.items() if k not in DRAWING} | {"temperature": 0.0}
    try:
        params = SamplingParams(**{"max_tokens": None, **defaults})
    except RequestError as error:
        raise StartupError(f"{where}: {error.message}") from error
    return defaults | ({"stop": params.stop} if "stop" in defaults else {})


def not_applied(values: Mapping[str, Any]) -> dict[str, Any]:
    """What asks for something that this server does not do, or would do only where it draws."""
    drawing = values.get("do_sample") is not False
    return {
        name: value
        for name, value in values.items()
        if value is not None
        and name not in ELSEWHERE
        and not (name in APPLIED and (drawing or name not in DRAWING))
        and value not in NEUTRAL.get(name, ())
    }


def token_ids(found: Any, where: str) -> list[int]:
    """Token ids as files write them: none, one or a list. Raises StartupError naming the file."""
    if found is None:
        return []
    tokens = found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in tokens):
        raise StartupError(
            f"{where}: eos_token_id must be a token id or a list of them, got {shown(found)}"
        )
    return list(dict.fromkeys(tokens))


def listed(values: Mapping[str, Any]) -> str:
    """Names and values in a row."""
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())
