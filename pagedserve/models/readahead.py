"""Asks the operating system for a model's weights before anybody reads them. No torch here.

The engine process takes seconds to import torch, in which a disk would stand still. What is asked
for meanwhile lies in the page cache when it is read.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from pagedserve.models.hub.filenames import INDEX, SINGLE, weight_map

log = logging.getLogger("pagedserve")

STEP_BYTES = 1 << 20  # Linux reads no more ahead than this, whatever it is asked for


def read_ahead(directory: Path) -> threading.Thread | None:
    """Ask for the weights in `directory`, in a thread; None where they would not fit into memory
    that nobody uses, or are not there: the engine will say so."""
    index = directory / INDEX
    names = sorted(set(weight_map(index).values())) if index.is_file() else [SINGLE]
    files = [directory / name for name in names if (directory / name).is_file()]
    if not files or sum(file.stat().st_size for file in files) > free_bytes():
        return None
    thread = threading.Thread(target=ask_for, args=(files,), name="read ahead", daemon=True)
    thread.start()
    return thread


def free_bytes() -> int:
    """Memory that holds nothing, not even what is read from a file."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ask_for(files: Sequence[Path]) -> None:
    """Have every byte read that is not in the page cache yet; returns before the last are."""
    for file in files:
        try:
            fd = os.open(file, os.O_RDONLY)
            try:
                for begin in range(0, os.fstat(fd).st_size, STEP_BYTES):
                    os.posix_fadvise(fd, begin, STEP_BYTES, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)
        except OSError as error:  # who reads it in earnest will have the same to say
            log.debug("%s is not read ahead: %s", file, error)
