"""The API process's half of a checkpoint: its directory, its text side, its defaults.

    hub id ─▶ directory ─┬─ tokenizer and chat template
                         ├─ generation_config.json ─▶ defaults of requests, end tokens
                         └─ config.json with overrides ─▶ what they change, to be shown

The server and the offline `LLM` both start with this; the engine process loads the rest from the
same directory, with the end tokens settled here, because only this side knows the tokenizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedserve.config import ModelConfig
from pagedserve.errors import StartupError
from pagedserve.models import config_json, generation_config
from pagedserve.models.architectures import is_native
from pagedserve.models.generation_config import GenerationConfig
from pagedserve.models.readahead import read_ahead
from pagedserve.models.telling import Tell
from pagedserve.models.tokenizer_classes import tokenizer_classes
from pagedserve.text.chat import ChatTemplate, load_text
from pagedserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextSide:
    """What is needed on this side of the channel.

    `tokenizer` is None where none is wanted, `template` where the checkpoint has none.
    `overridden`: what `--hf-overrides` changes, a line a value. `architecture_file`: what the
    engine process will run of the user's own. `through_transformers`: there is no native family, or
    `--model-impl` says so.
    """

    directory: Path
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    generation: GenerationConfig
    overridden: list[str]
    architecture_file: str | None = None
    through_transformers: bool = False

    def engine_options(self) -> dict[str, Any]:
        """The options that are settled now, for the engine process."""
        return {"model": str(self.directory)} | self.generation.engine_options()

    def lines(self) -> list[str]:
        """What the user should know of it, in lines."""
        changed = [f"config.json overridden: {line}" for line in self.overridden]
        if self.architecture_file is not None:
            changed.append(f"architecture file {self.architecture_file} is run: code of yours")
        if self.through_transformers:
            changed.append("model code: transformers' own, with our attention and cache")
        return changed + self.generation.lines()


def load(model: ModelConfig, on_progress: Tell) -> TextSide:
    """Find the model and read its text side. Raises StartupError."""
    from pagedserve.models.hub import resolve

    check_revision(model)
    directory = resolve(
        model.model,
        model.revision,
        offline=model.offline,
        weights=model.load_format != "dummy",
        on_progress=on_progress,
    )
    if model.load_format != "dummy":
        read_ahead(directory)
    overrides = model.hf_overrides or {}
    plain = config_json.read_json(directory / "config.json")
    generation = generation_config.read(
        directory,
        config_json.merged(plain, overrides),
        source=model.generation_config,
        override=model.override_generation_config,
    )
    tokenizer, template = None, None
    if not model.skip_tokenizer_init:
        tokenizer, template = load_text(
            tokenizer_directory(model, directory, on_progress),
            chat_template=model.chat_template,
            class_defaults=tokenizer_classes(),
        )
        generation = generation.ending_with(tokenizer.end_id)
    else:
        generation = generation.without_text()
    changes = config_json.changes(plain, overrides)
    return TextSide(
        directory,
        tokenizer,
        template,
        generation,
        changes,
        architecture_file=model.architecture_file,
        through_transformers=through_transformers(model, config_json.merged(plain, overrides)),
    )


def through_transformers(model: ModelConfig, config: dict[str, Any]) -> bool:
    """Whether the engine will say so; False where only it can know, or will complain."""
    if model.architecture_file is not None or not config.get("architectures"):
        return False
    return not is_native(config, model.model_impl)


def check_revision(model: ModelConfig) -> None:
    """Raise StartupError for a revision of what has none."""
    named = (
        ("--revision", model.revision, model.model),
        ("--tokenizer-revision", model.tokenizer_revision, model.tokenizer or model.model),
    )
    for flag, revision, source in named:
        if revision is not None and Path(source).expanduser().is_dir():
            raise StartupError(
                f"{flag} {revision} is for hub ids; {source} is a directory, which has one state"
            )


def tokenizer_directory(model: ModelConfig, directory: Path, on_progress: Tell) -> Path:
    """Where the tokenizer is: with the model, or in a place of its own."""
    from pagedserve.models.hub import resolve_tokenizer

    if model.tokenizer is None and model.tokenizer_revision is None:
        return directory
    return resolve_tokenizer(
        model.tokenizer or model.model,
        model.tokenizer_revision,
        offline=model.offline,
        on_progress=on_progress,
    )
