"""A local server through the openai SDK: a streamed chat, and two completions in one request.

make serve                                       # in one terminal
.venv/bin/python examples/openai_client.py [URL]   # in another
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def chat(client: OpenAI, model: str) -> None:
    """Print an answer while it is being written, then what it cost."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a short story."}],
        max_tokens=64,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")


def complete(client: OpenAI, model: str) -> None:
    """Print the continuations of two prompts, computed in one batch."""
    prompts = ["Once upon a time", "The cat"]
    answer = client.completions.create(model=model, prompt=prompts, max_tokens=32, temperature=0)
    for choice in answer.choices:
        print(f"{prompts[choice.index]!r} → {choice.text!r} ({choice.finish_reason})")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("PAGEDSERVE_API_KEY", "none"))
    model = client.models.list().data[0].id
    chat(client, model)
    complete(client, model)
