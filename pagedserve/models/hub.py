"""Find a model: a directory passes through, a hub id becomes one. No torch here.

Nothing is fetched for a directory; for a hub id the local cache is asked first, and the network
only where the cache has no whole snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pagedserve.errors import StartupError

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt"]
SKIPPED = ["original/*", "consolidated*", "onnx/*"]  # the same weights again, in other forms
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve(
    model: str,
    revision: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """The directory of `model`, downloaded first where needed.

    Raises StartupError, with what to do, where there is no such directory or hub model, where it is
    not a model, and where the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(f"{path} is no model directory: it has no config.json")
        return path
    if path.exists():
        raise StartupError(f"{path} is a file; a model is a directory with config.json and weights")
    if looks_like_path(model) or not HUB_ID.fullmatch(model):
        raise StartupError(f"there is no directory {model}")
    return cached(model, revision) or download(model, revision, on_progress)


def looks_like_path(model: str) -> bool:
    """Whether `model` can only be meant as a path."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model


def cached(model: str, revision: str | None) -> Path | None:
    """The snapshot in the local cache if all of its files are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return path if complete(path) else None


def complete(snapshot: Path) -> bool:
    """Whether a snapshot has its config and every weight file it names."""
    index = snapshot / "model.safetensors.index.json"
    if not (snapshot / "config.json").is_file():
        return False
    if index.is_file():
        shards = set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text()))
        return all((snapshot / shard).is_file() for shard in shards)
    return (snapshot / "model.safetensors").is_file()


def download(model: str, revision: str | None, on_progress: Callable[[str], None] | None) -> Path:
    """Fetch a snapshot from the hub, only the files that serving needs."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if on_progress:
        on_progress(f"downloading {model} from the Hugging Face hub")
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=FILES, ignore_patterns=SKIPPED
        )
    except GatedRepoError as error:
        raise StartupError(
            f"{model} is gated: accept its terms on the hub, then log in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise StartupError(f"{model} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise StartupError(
            f"there is no directory {model}, and no hub model of this name that this machine may "
            "read; check the name, or log in (hf auth login) if it is private"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, HTTPError) as error:
        raise StartupError(
            f"there is no directory {model}, and the Hugging Face hub cannot be reached for it; "
            "give a directory, or download it where there is network (hf download) and copy it"
        ) from error
    except OSError as error:
        raise StartupError(f"cannot download {model}: {error}") from error
    path = Path(found)
    if not complete(path):
        raise StartupError(
            f"{model} on the hub has no config.json with safetensors weights; .bin weights and "
            "single-file formats are not supported"
        )
    return path
