"""What `transformers.generate` needs for workload A on a GPU, in left-padded batches of 32.

    python benchmarks/static_generate.py --shape qwen3-0.6b [--steps 64]

A batch runs until its longest answer is whole, and of the shorter ones the rest is waste. `--steps`
tokens of the first batch are timed, the others' time is that of their steps; random weights. Prints
one JSON line: ms a step, and useful tokens/s over all 256 requests. Compare with row A of
`benchmarks/offline.py` in the same session.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
import workload

from pagedserve.commands.bench import machine

SHAPES = Path(__file__).parent / "shapes"
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    config = transformers.AutoConfig.from_pretrained(SHAPES / args.shape)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    work = workload.offline()
    batches = [work[at : at + BATCH] for at in range(0, len(work), BATCH)]
    prompts = [prompt for prompt, _ in batches[0]]
    generate(model, prompts, 4)
    prefill = timed(model, prompts, 1)
    step = (timed(model, prompts, 1 + args.steps) - prefill) / args.steps
    longest = [max(length for _, length in batch) for batch in batches]
    useful = sum(length for _, length in work)
    seconds = len(batches) * prefill + step * sum(longest)
    print(
        json.dumps(
            {
                "benchmark": "static_generate",
                "shape": args.shape,
                "step_ms": round(1e3 * step, 2),
                "prefill_ms": round(1e3 * prefill, 1),
                "useful_tokens_per_s": round(useful / seconds, 1),
                "transformers": transformers.__version__,
                "gpu": torch.cuda.get_device_name(),
                **machine.versions(),
            }
        )
    )


def timed(model: transformers.PreTrainedModel, prompts: list[list[int]], count: int) -> float:
    """Seconds for `count` tokens of each prompt."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    generate(model, prompts, count)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def generate(model: transformers.PreTrainedModel, prompts: list[list[int]], count: int) -> None:
    """Greedily, whatever the model says."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device="cuda")
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device="cuda")
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == longest + count


if __name__ == "__main__":
    main()
