"""docs/models.md: the catalogue as a page, and a comparison with other servers.

`make docs` writes it; `python -m pagedserve.models.catalog_page` prints it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from pagedserve.models.catalog import OTHERS, Catalog, by_reason, read

HEAD = """\
# Models

This page is generated from the code and from what was tested: `make docs`. `pagedserve models`
prints the same tables, `pagedserve models --json` for programs.

An architecture is the first name in `architectures` of a model's `config.json`. It is served in one
of two ways, which `--model-impl` chooses between (`auto`: native where there is one):

- **native**: our own decoder, put together from a description of the family
  ([architecture.md](architecture.md)). The fast way.
- **through transformers**: the class's own code in the installed transformers, with our attention
  over our paged cache in the place of its own. Batching, chunked prefill and prefix caching work as
  always; CUDA graphs and our kernels for everything beside attention do not.

Anything else is refused with the reason, in all but a few cases before its weights are read. A
family that is missing can be added in a file of your own: [custom-models.md](custom-models.md).
"""

NATIVE = """\
## Native

{families} families, {names} names. Each is tested as a tiny random checkpoint in fp32 through the
paged path: two sequences of different length in one batch, prompts in chunks, then token by token;
logits equal the oracle's to a relative 1e-5 and 32 greedy tokens are the same (of the text parts of
models with images, and of families that are another one under other names: logits). The oracle is
transformers or, where that has no such class, a reference in plain torch, written from the paper
and the published config. {witnesses} of the families are also equal to a relative 1e-4 when they
are forced through transformers' modeling, as a second witness.

"""

THROUGH = """\
## Through transformers

Tried with transformers {version}, each class as a tiny random checkpoint, its logits over the paged
cache compared with its own by eager attention and in one piece. The same comparison is made at
every start, of the real weights on a few tokens: a model that fails it is refused. Other versions
from 5.17 on may know other classes; what counts is what the installed one can do.

A dynamic or longrope scaling depends on the longest sequence of a batch here, so such models are
served up to their original context only.

"""

UNBUILT = """\
## Not tried

No tiny checkpoint of these runs alone. The start decides, as for every other class.

"""

REFUSED = """\
## Refused

Causal language models of transformers that cannot run over a paged cache of keys and values, or do
not let their attention be replaced.

"""


def page(catalog: Catalog, others: dict[str, Any]) -> str:
    """The whole text."""
    natives = catalog.natives
    parts = [
        HEAD,
        NATIVE.format(
            families=len(natives),
            names=sum(len(each.names) for each in natives),
            witnesses=sum(each.second_witness for each in natives),
        )
        + table(
            ("architecture", "other names, read alike", "tested against", "configs"),
            (
                (
                    code(each.names[:1]),
                    code(each.names[1:]),
                    each.oracle or "nothing of its own",
                    str(each.configs),
                )
                for each in natives
            ),
        ),
        THROUGH.format(version=catalog.transformers)
        + table(
            ("architecture", "relative error"),
            ((code([each.name]), cell(each.detail)) for each in catalog.with_result("equal")),
        ),
        UNBUILT
        + table(
            ("architecture", "why"),
            ((code([each.name]), cell(each.detail)) for each in catalog.with_result("unbuilt")),
        ),
        REFUSED
        + table(
            ("reason", "architectures"),
            (
                (cell(reason), code(names))
                for reason, names in by_reason(catalog.with_result("refused")).items()
            ),
        ),
        compared(catalog, others),
    ]
    return "\n".join(parts)


def compared(catalog: Catalog, others: dict[str, Any]) -> str:
    """What others dropped and is served here, and what they serve and is not."""
    vllm, sglang = others["vllm"], others["sglang"]
    lacking = [name for name in vllm["native"] if catalog.how([name]) == "no"]
    both = len(vllm["native"]) - len(lacking)
    dropped = [
        (code([name]), version, how)
        for name, version in vllm["removed"].items()
        if (how := catalog.how([name])) != "no"
    ]
    gone = [name for name in vllm["removed"] if catalog.how([name]) == "no"]
    listed = {*vllm["native"], *vllm["through transformers"], *vllm["removed"]}
    ours = [name for each in catalog.natives for name in each.names if name not in listed]
    return f"""\
## Compared with vLLM {vllm["version"]} and SGLang {sglang["version"]}

As read in their sources; names are those of their registries, text models only. vLLM too runs any
class of transformers whose attention can be replaced, through a backend of its own.

The architectures of 2023:

{
        table(
            ("model", "vLLM", "SGLang", "pagedserve"),
            (
                (name, theirs, others_, catalog.how(names))
                for name, names, theirs, others_ in others["list of 2023"]
            ),
        )
    }
Dropped by vLLM, served here:

{table(("architecture", "vLLM had it until", "here"), dropped)}
Dropped by vLLM and not served here either: {code(gone)}.

In neither its registry nor its past, and native here (vLLM may serve those that transformers knows
through its backend): {code(sorted(ours, key=str.lower))}.

Of the {len(vllm["native"])} names that vLLM serves by code of its own, {
        both
    } are served here. These
are not; most keep a state that is no key and value (Mamba, linear attention, short convolutions),
choose their keys by an indexer, or have no class in transformers: {code(lacking)}.

Beyond architectures, vLLM and SGLang serve quantised checkpoints, LoRA adapters, images and audio,
and several GPUs; this version of pagedserve serves text models in 16 and 32 bits on one device.
"""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; a line that says so where there is no row."""
    body = list(rows)
    if not body:
        return "None.\n"
    lines = [head, ("---",) * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def code(names: Iterable[str]) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def cell(text: str) -> str:
    """Text that does not end a cell of a table."""
    return text.replace("|", "\\\\|").replace("<", "&lt;")


def whole() -> str:
    """The page as things are."""
    return page(read(), json.loads(OTHERS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.stdout.write(whole())
