"""Architectures of the user's own: a Python file that registers them as ours are registered.

The file is named on the command line, lies on this machine, and is run; nothing that a checkpoint
brings ever is.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from pagedserve.errors import StartupError
from pagedserve.models.architectures.registry import ARCHITECTURES


def run_architecture_file(path: Path) -> list[str]:
    """Run the file once in this process; the class names that it added, sorted.

    Raises StartupError where it cannot be run, adds nothing, or adds what there is already.
    """
    file = path.expanduser().resolve()
    name = "pagedserve_architecture_file:" + str(file)
    if name not in sys.modules:
        before = set(ARCHITECTURES)
        module = importlib.util.spec_from_file_location(name, file)
        if not file.is_file() or module is None or module.loader is None:
            raise StartupError(f"--architecture-file: {path} is no Python file (*.py)")
        code = importlib.util.module_from_spec(module)
        try:
            module.loader.exec_module(code)
        # Whatever the user's own code raises; the start ends with it.
        except Exception as error:
            raise StartupError(
                f"--architecture-file: {path} failed: {type(error).__name__}: {error}"
            ) from error
        code.__dict__["ADDED"] = sorted(set(ARCHITECTURES) - before)
        sys.modules[name] = code
    added: list[str] = sys.modules[name].__dict__["ADDED"]
    if not added:
        raise StartupError(
            f"--architecture-file: {path} adds no architecture; it needs a function under "
            '@arch("NameOfTheClass")'
        )
    return added
