"""Find a model: a directory passes through, a hub id becomes one. No torch here.

Nothing is fetched for a directory; for a hub id the local cache is asked first, without a request,
and the network only where the cache has no whole snapshot. `pull` always asks the hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pagedserve.errors import StartupError
from pagedserve.models.hub.filenames import INDEX, SINGLE, TOKENIZER, lacking, listing, matches
from pagedserve.models.telling import Tell, tell_nobody

if TYPE_CHECKING:
    from pagedserve.models.hub.download import Repo

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
BRANCH = "main"


def resolve(
    model: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    weights: bool = True,
    on_progress: Tell = tell_nobody,
) -> Path:
    """The directory of `model`, downloaded first where needed and not `offline`.

    Without `weights`, which dummy ones replace, config and tokenizer are enough. Raises
    StartupError, with what to do, where there is no such directory or hub model, where it is not a
    model, and where the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(f"{path} is no model directory: it has no config.json")
        return path
    if path.exists():
        raise StartupError(f"{path} is a file; a model is a directory with config.json and weights")
    found = repo(model)
    commit = found.commit(revision or BRANCH)
    if commit and not missing(found.snapshot(commit), weights=weights):
        return found.snapshot(commit)
    if offline:
        lacks = missing(found.snapshot(commit), weights=weights) if commit else []
        raise StartupError(not_cached(found, revision, lacks))
    return fetched(found, revision, on_progress, weights=weights)


def resolve_tokenizer(
    name: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    on_progress: Tell = tell_nobody,
) -> Path:
    """The directory of a tokenizer: as `resolve`, but there need be neither config nor weights."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise StartupError(f"{path} is a file; a tokenizer is a directory with its files")
    found = repo(name)
    commit = found.commit(revision or BRANCH)
    snapshot = commit and found.snapshot(commit)
    if snapshot and any(matches(each.name, TOKENIZER) for each in snapshot.glob("*")):
        return snapshot
    if offline:
        raise StartupError(not_cached(found, revision))
    return fetched(found, revision, on_progress, weights=False, config=False)


def pull(
    model: str,
    revision: str | None = None,
    *,
    pickles: bool = False,
    on_progress: Tell = tell_nobody,
) -> Path:
    """Bring what the hub has of `model` now into the cache; its directory. Raises StartupError."""
    if Path(model).expanduser().exists():
        raise StartupError(f"{model} is here already: only models of the hub are pulled")
    return fetched(repo(model), revision, on_progress, pickles=pickles)


def pulled(model: str, revision: str | None = None) -> Path:
    """A directory, or what the cache has of a hub model, whole or not. Raises StartupError."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    found = repo(model)
    commit = found.commit(revision or BRANCH)
    if commit is None or not found.snapshot(commit).is_dir():
        raise StartupError(
            f"{model} is neither a directory nor in the cache; pagedserve pull {model} gets it"
        )
    return found.snapshot(commit)


def repo(model: str) -> Repo:
    """The hub model of this name. Raises StartupError for what can only be meant as a path."""
    if looks_like_path(model) or not HUB_ID.fullmatch(model) or "--" in model or ".." in model:
        raise StartupError(f"there is no directory {model}")
    from huggingface_hub import constants

    from pagedserve.models.hub.download import Repo

    return Repo(model, constants.ENDPOINT, Path(constants.HF_HUB_CACHE).expanduser())


def looks_like_path(model: str) -> bool:
    """Whether `model` can only be meant as a path."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model


def missing(snapshot: Path, *, weights: bool = True) -> list[str]:
    """What a snapshot lacks of its config and the weights that it names."""
    lacks = [name for name in ("config.json",) if not (snapshot / name).is_file()]
    if not weights:
        return lacks
    if (snapshot / INDEX).is_file():
        return lacks + lacking(snapshot / INDEX)
    return lacks + [name for name in (SINGLE,) if not (snapshot / name).is_file()]


def not_cached(found: Repo, revision: str | None, lacks: Sequence[str] = ()) -> str:
    """Why a model cannot be had offline; `lacks`: what its snapshot has not."""
    what = found.name + (f" at {revision}" if revision else "")
    why = f"the cache {found.cache} has no {what}"
    commit = found.commit(revision or BRANCH)
    if lacks and commit and found.snapshot(commit).is_dir():
        why = f"{found.snapshot(commit)} lacks {listing(list(lacks))}"
    command = f"pagedserve pull {found.name}" + (f" --revision {revision}" if revision else "")
    return f"--offline is set, and {why}; get it where there is network: {command}"


def fetched(found: Repo, revision: str | None, on_progress: Tell, **options: bool) -> Path:
    """Download, with `download`'s options, and explain what went wrong."""
    from pagedserve.models.hub.download import download
    from pagedserve.models.hub.fetch import client_error

    def tell(detail: str, done: int, total: int) -> None:
        on_progress(f"downloading {found.name}", detail, done, total)

    try:
        return download(found, revision or BRANCH, tell=tell, **options)
    except (OSError, client_error()) as error:
        raise StartupError(explained(found, revision, error)) from error


def explained(found: Repo, revision: str | None, error: Exception) -> str:
    """What an error of the hub or of the disk means, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model = found.name
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return (
            f"{model} is gated: accept its terms at {found.endpoint}/{model}, then log in "
            "(hf auth login, or HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{model} has no revision {revision or BRANCH!r} on the hub"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"there is no directory {model}, and no hub model of this name that this machine may "
            "read; check the name, or log in (hf auth login, or HF_TOKEN) if it is private"
        )
    if status == 403:
        return f"{found.endpoint} forbids this machine to read {model}: {first_line(error)}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{model} is not whole in the cache {found.cache}, and HF_HUB_OFFLINE is set"
    if status is None and isinstance(error, OSError):
        return f"cannot download {model} into {found.cache}: {error.strerror or error}"
    return (
        f"there is no directory {model}, and the hub at {found.endpoint} cannot be reached for it "
        f"({first_line(error)}); give a directory, or pull it where there is network and copy the "
        f"cache {found.cache}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error that may be pages long."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
