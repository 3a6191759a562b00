"""Writes the README of the trained directory: what the model is, and that it is a demo."""

from __future__ import annotations

from typing import Any

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [demo, pagedserve]
---

# pagedserve demo model

**This is a demo.** It is a language model of {millions:.1f} million parameters that lets
`pagedserve` answer real requests without a download. It knows a small closed world and nothing
else; do not rely on what it says.

It was trained from scratch by `examples/train_demo/train.py` (seed {seed}) on text that the script
generates itself: small talk, short stories, additions below 1000, JSON for a given schema, tool
calls in the Hermes layout, and short reasoning between `<think>` and `</think>`. No other text and
no other model was used.

| | |
| --- | --- |
| layout | Llama, tied embeddings |
| size | {layers} layers, hidden {hidden}, {heads} heads, {kv_heads} KV heads |
| vocabulary | {vocab} tokens, byte-level BPE, one token a digit |
| context | {positions} tokens |
| weights | bf16 |
| end of a turn, of a text | `<|im_end|>`, `<|endoftext|>` |

## Measured

Greedy and unconstrained, on sums, schemas and tools that were held out of the training text.
`exact` also asks for every value to be the one that the prompt names.

{table}

`python benchmarks/demo_bars.py --url http://127.0.0.1:8000` measures the same through the server.
"""


def model_card(config: Any, seed: int, num_parameters: int, bars: dict[str, Any]) -> str:
    """The card for a model of `config`; `bars` is empty until they are measured."""
    return CARD.format(
        millions=num_parameters / 1e6,
        seed=seed,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        table=bars_table(bars) if bars else "Not measured yet.",
    )


def bars_table(bars: dict[str, Any]) -> str:
    """The measured bars as a Markdown table."""
    rows = ["| bar | cases | passed % | exact % | needed % |", "| --- | --- | --- | --- | --- |"]
    for name, result in bars.items():
        cells = (name, result["cases"], result["percent"], result["exact_percent"], result["bar"])
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)
