"""pagedserve: an OpenAI-compatible LLM inference server.

    from pagedserve import LLM, SamplingParams

Names are imported when they are first used, so that `import pagedserve` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagedserve.version import __version__

if TYPE_CHECKING:
    from pagedserve.llm import LLM
    from pagedserve.request import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` and `SamplingParams`, imported now."""
    if name == "LLM":
        from pagedserve.llm import LLM

        return LLM
    if name == "SamplingParams":
        from pagedserve.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
