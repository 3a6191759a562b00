"""The same engine without a server: `LLM` and `SamplingParams`, with vLLM's names and shapes.

.venv/bin/python examples/offline.py [MODEL]     # the bundled demo model if left out
"""

from __future__ import annotations

import sys

from pagedserve import LLM, SamplingParams


def main(*model: str) -> None:
    """Continue a few prompts in one batch, then answer a chat."""
    llm = LLM(*model)
    prompts = ["Once upon a time", "The cat", "17 + 25 ="]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32)):
        print(f"{output.prompt!r} → {output.outputs[0].text!r}")

    messages = [{"role": "user", "content": "Tell me a short story."}]
    params = SamplingParams(n=2, seed=7, max_tokens=64)
    for answer in llm.chat(messages, params)[0].outputs:
        print(f"{answer.text!r} ({answer.finish_reason}, {len(answer.token_ids)} tokens)")
    llm.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:2])
