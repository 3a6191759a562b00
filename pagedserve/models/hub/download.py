"""Bring a hub model into the local cache: only the files that serving needs, and no byte twice.

    list ─▶ choose ─▶ fetch blobs/<etag> ─▶ link snapshots/<commit>/<name> ─▶ refs/<revision>

Listing, log-in and session are huggingface_hub's, and the cache is laid out as it lays it out, so
that other tools find what is here and the other way round. The bytes are fetched by `fetch.py`,
because its own download forgets an unfinished file when the process ends.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pagedserve.errors import StartupError
from pagedserve.models.hub.fetch import SILENCE_SECONDS, Fetch, fetch_all
from pagedserve.models.hub.filenames import (
    INDEX,
    PICKLE_INDEX,
    SINGLE,
    is_small,
    listing,
    pickled,
    weight_map,
)
from pagedserve.models.hub.progress import Progress, size

HEADROOM_BYTES = 64 << 20  # of the disk that stay free
COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file of the hub. `etag`: its SHA-256 where it is large, else its git blob id (SHA-1)."""

    name: str
    num_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Repo:
    """A model of the hub at `endpoint`, and the cache of its files here."""

    name: str
    endpoint: str
    cache: Path

    @property
    def folder(self) -> Path:
        """This model's part of the cache."""
        return self.cache / "--".join(("models", *self.name.split("/")))

    def blob(self, remote: Remote) -> Path:
        """Where a file's bytes are kept."""
        return self.folder / "blobs" / remote.etag

    def snapshot(self, commit: str) -> Path:
        """The directory of a commit's files."""
        return self.folder / "snapshots" / commit

    def commit(self, revision: str) -> str | None:
        """The commit that `revision` was when it was last asked for; None if it never was."""
        if COMMIT.fullmatch(revision):
            return revision
        ref = self.folder / "refs" / revision
        return ref.read_text().strip() if ref.is_file() else None


def download(
    repo: Repo,
    revision: str,
    *,
    weights: bool = True,
    pickles: bool = False,
    config: bool = True,
    tell: Callable[[str, int, int], None],
) -> Path:
    """Fetch what `revision` has and the cache lacks; the snapshot's directory.

    Without `weights` config and tokenizer only; without `config` it need be no model. `pickles`
    allows weights that are pickles, which are refused otherwise. `tell` hears of the progress.
    Raises StartupError for what cannot be served, a full disk or damaged bytes, and the hub's own
    errors (`hub.explained`).
    """
    tell("asking for its files", 0, 0)
    commit, remote = list_files(repo, revision)
    snapshot, progress = repo.snapshot(commit), Progress(tell)
    if config and "config.json" not in remote:
        raise StartupError(f"{repo.name} on the hub is no model to serve: it has no config.json")
    weights = weights and not converted(remote, snapshot)
    if weights:
        check_form(repo, remote, pickles)
    names = [name for name in remote if is_small(name) or (pickles and name == PICKLE_INDEX)]
    small = [remote[name] for name in names]
    fetch_files(repo, commit, small, progress)
    large = weight_files(repo, remote) if weights else []
    check_room(repo, large)
    fetch_files(repo, commit, large, progress)
    # config.json last: where it is, all the others are.
    for each in [*large, *sorted(small, key=lambda file: file.name == "config.json")]:
        link(repo.blob(each), snapshot / each.name)
    write_ref(repo, revision, commit)
    return snapshot


def list_files(repo: Repo, revision: str) -> tuple[str, dict[str, Remote]]:
    """The commit that `revision` names, and its files by name."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=repo.endpoint).model_info(
            repo.name, revision=revision, files_metadata=True, timeout=SILENCE_SECONDS
        )
    except (ValueError, KeyError, TypeError) as error:  # an answer of something else, or no name
        if isinstance(error, OSError):
            raise
        raise StartupError(
            f"{repo.endpoint} cannot be asked for {repo.name}: {type(error).__name__}: {error}; "
            "check the name, and that this is a hub (HF_ENDPOINT)"
        ) from error
    found = {}
    for each in info.siblings or []:
        etag = (each.lfs.sha256 if each.lfs else each.blob_id) or ""
        if each.size is not None and ETAG.fullmatch(etag):  # it becomes a file's name here
            found[each.rfilename] = Remote(each.rfilename, each.size, etag)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit) or (info.siblings and not found):
        raise StartupError(
            f"{repo.endpoint} does not list the files of {repo.name} with commit, lengths and "
            "hashes, as a hub does; download it by other means and give the directory"
        )
    return commit, found


def check_form(repo: Repo, remote: dict[str, Remote], pickles: bool) -> None:
    """Raise StartupError where no weights are in a form that can be used, before any is fetched."""
    if SINGLE in remote or INDEX in remote:
        return
    found = pickled(remote)
    if not found:
        raise StartupError(
            f"{repo.name} on the hub has neither {SINGLE} nor {INDEX}; other forms of weights are "
            "not supported"
        )
    if not pickles:
        total = size(sum(remote[name].num_bytes for name in found))
        raise StartupError(
            f"{repo.name} has its weights as pickles only ({listing(found)}; {total}). They run "
            f"code when they are opened, so they are not read. Get and convert them with: "
            f"pagedserve pull {repo.name} --include-bin && pagedserve convert {repo.name}"
        )


def weight_files(repo: Repo, remote: dict[str, Remote]) -> list[Remote]:
    """Just the files of weights that will be read. Raises StartupError where one is not there."""
    if INDEX in remote:
        names = sorted(set(weight_map(repo.blob(remote[INDEX])).values()))
    elif SINGLE in remote:
        names = [SINGLE]
    elif PICKLE_INDEX in remote:
        names = sorted(set(weight_map(repo.blob(remote[PICKLE_INDEX])).values()))
    else:
        names = pickled(remote)
    if absent := [name for name in names if name not in remote]:
        raise StartupError(f"{repo.name} on the hub lacks files of its index: {listing(absent)}")
    return [remote[name] for name in names]


def converted(remote: dict[str, Remote], snapshot: Path) -> bool:
    """Whether `pagedserve convert` has written here what the hub has not."""
    names = (SINGLE, INDEX)
    return any((snapshot / n).is_file() for n in names) and not any(n in remote for n in names)


def check_room(repo: Repo, files: list[Remote]) -> None:
    """Raise StartupError unless the disk has room for what is still to come of `files`."""
    blobs = [(file, repo.blob(file)) for file in files]
    missing = sum(file.num_bytes for file, blob in blobs if not blob.exists())
    begun = (blob.with_name(f"{blob.name}.incomplete") for _, blob in blobs if not blob.exists())
    missing -= sum(path.stat().st_size for path in begun if path.exists())
    free = shutil.disk_usage(repo.folder).free
    if missing > 0 and missing + HEADROOM_BYTES > free:
        raise StartupError(
            f"{repo.name} needs {size(missing)} more in {repo.cache}, whose disk has {size(free)} "
            "free; make room, or set HF_HOME to a directory on another disk"
        )


def fetch_files(repo: Repo, commit: str, files: list[Remote], progress: Progress) -> None:
    """Fetch what is missing of `files` into the cache."""
    progress.expect(len(files), sum(file.num_bytes for file in files))
    fetches = []
    for file in files:
        url = f"{repo.endpoint}/{repo.name}/resolve/{commit}/{quote(file.name)}"
        blob = repo.blob(file)
        fetches.append(Fetch(file.name, url, file.etag, file.num_bytes, blob, progress))
    fetch_all(fetches, progress.report)


def link(blob: Path, name: Path) -> None:
    """Make `name` lead to `blob`; where there are no links, be it."""
    if name.exists():
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)  # a link that leads nowhere
    try:
        name.symlink_to(os.path.relpath(blob, name.parent))
    except OSError:
        blob.replace(name)


def write_ref(repo: Repo, revision: str, commit: str) -> None:
    """Remember which commit a branch or tag is."""
    if revision == commit:
        return
    ref = repo.folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f"{ref.name}.{os.getpid()}")
    new.write_text(commit)
    new.replace(ref)
