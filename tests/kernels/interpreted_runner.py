"""The GPU's runner on a CPU, in Triton's interpreter: the tokens of the plain runner.

Stages run op by op, products and norms by torch; what makes inputs, attends, draws and writes back
are the GPU's own kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pagedserve.attention.triton import Processors, TritonAttention
from pagedserve.config import Config
from pagedserve.device import pick
from pagedserve.kernels.step_inputs import Message
from pagedserve.models.loading import load_model
from pagedserve.step import BlockId, Join, Slot, Step
from pagedserve.worker.gpu_runner import Buffers, GpuRunner
from pagedserve.worker.runner import Runner
from pagedserve.worker.start import Worker, make, settle
from tests.checkpoints import tiny_checkpoint
from tests.worker.soak import Load, soak

# Numbers of masked-out places, which a GPU computes without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCK_SIZE = 4
OPTIONS = {
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 12,
    "max_model_len": 32,
    "num_gpu_blocks_override": 14,
    "enforce_eager": True,
    "device": "cpu",
}


class Interpreted(GpuRunner):
    """On memory that needs no pinning, with events that have always happened."""

    def _buffers(self, layout: Message, rows: int) -> Buffers:
        message = torch.zeros(layout.size, dtype=torch.int32)
        done = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        return Buffers(message, message.numpy(), torch.zeros(2 * rows, dtype=torch.int32), done)


def workers(directory: Path, implementation: str = "native") -> tuple[Worker, Worker]:
    config = Config.from_options({"model": str(directory), **OPTIONS})
    device = pick("cpu")
    model = load_model(directory, device=device, context=32, model_impl=implementation)
    info = replace(settle(config, device, model), eos_token_ids=[2])
    plain = make(config, device, model, info)
    assert isinstance(plain, Runner)
    attention = TritonAttention(device, Processors(count=2, capability=(8, 0)))
    return plain, Interpreted(config, device, model, info, attention)


def test_tokens_are_those_of_the_plain_runner(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    plain, ours = workers(tmp_path)
    for depth in (1, 2):
        wanted = soak(plain, block_size=BLOCK_SIZE, steps=25, depth=depth)
        assert sum(map(len, wanted.values())) > 30
        assert soak(ours, block_size=BLOCK_SIZE, steps=25, depth=depth) == wanted


def test_modeling_of_transformers_runs_in_it_too(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    plain, ours = workers(tmp_path, "transformers")
    wanted = soak(plain, block_size=BLOCK_SIZE, steps=12, depth=2)
    assert soak(ours, block_size=BLOCK_SIZE, steps=12, depth=2) == wanted


def test_log_probabilities_are_those_of_the_plain_runner(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    answers = []
    for worker in workers(tmp_path):
        load = Load(3, 97, 24)
        request = load.request()
        params = request.params.replace(logprobs=3, prompt_logprobs=2, max_tokens=3)
        answers.append(logprobs_of(worker, [*request.prompt_token_ids, 5, 6, 7], params))
    for one, two in zip(*answers, strict=True):
        assert one.top_ids == two.top_ids and one.rank == two.rank
        assert abs(one.logprob - two.logprob) < 1e-4


def logprobs_of(worker: Worker, prompt: list[int], params: object) -> list:
    slot, count = Slot(1), len(prompt)
    join = Join(slot, prompt, count, params, seed=7)
    blocks = [BlockId(i) for i in range(-(-(count + 1) // BLOCK_SIZE))]
    grown = [[slot] * len(blocks), list(range(len(blocks))), blocks]
    first = worker.launch(Step(0, [join], [slot], [0], [count], [True], *grown)).result()
    second = worker.launch(Step(1, [], [slot], [count], [1], [True], [], [], [])).result()
    return [*first.prompt_logprobs[slot], *first.logprobs, *second.logprobs]
