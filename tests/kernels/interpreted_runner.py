"""The GPU's runner on a CPU, in Triton's interpreter: the tokens of the plain runner.

Stages run op by op, products and norms by torch; what makes inputs, attends, draws and writes back
are the GPU's own kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pagedserve.attention.triton import Processors, TritonAttention
from pagedserve.config import Config
from pagedserve.device import Cpu, Device, pick
from pagedserve.kernels import moe
from pagedserve.kernels.experts import ExpertWeights
from pagedserve.kernels.step_inputs import Message
from pagedserve.models.loading import load_model
from pagedserve.request import SamplingParams
from pagedserve.step import BlockId, Join, Slot, Step
from pagedserve.worker import gpu_runner
from pagedserve.worker.gpu_runner import Buffers, GpuRunner, permanent
from pagedserve.worker.kv_cache import block_bytes
from pagedserve.worker.memory import tensor_bytes
from pagedserve.worker.results import Results
from pagedserve.worker.runner import Runner
from pagedserve.worker.sizes import Limits
from pagedserve.worker.start import Worker, make, settle
from tests.checkpoints import tiny_checkpoint
from tests.worker.breaking import Breaking, now_and_then, requests_of, serve
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
        results = torch.zeros(Results(rows, scored=True).size, dtype=torch.int32)
        return Buffers(message, message.numpy(), results, done)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, and the largest of integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


def workers(
    directory: Path, implementation: str = "native", **options: int
) -> tuple[Worker, Worker]:
    asked = {**OPTIONS, **options}
    config = Config.from_options({"model": str(directory), **asked})
    device, length = pick("cpu"), int(asked["max_model_len"])
    model = load_model(directory, device=device, context=length, model_impl=implementation)
    info = replace(settle(config, device, model), eos_token_ids=[2])
    plain = make(config, device, model, info)
    assert isinstance(plain, Runner)
    return plain, Interpreted(config, device, model, info, attention_of(device))


def attention_of(device: Device) -> TritonAttention:
    return TritonAttention(device, Processors(count=2, capability=(8, 0)))


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


def test_a_row_that_asks_for_log_probabilities_before_it_draws(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    first = Join(Slot(0), [3, 4], 2, SamplingParams(temperature=0.0), seed=1)
    asking = Join(Slot(1), [5] * 9, 9, SamplingParams(temperature=0.0, logprobs=4), seed=2)
    blocks = [BlockId(i) for i in range(4)]
    grown = [[Slot(0), *[Slot(1)] * 3], [0, 0, 1, 2], blocks]
    slots = [Slot(0), Slot(1)]
    answers = []
    for worker in workers(tmp_path):
        outputs = [
            worker.launch(step).result()
            for step in (
                Step(0, [first, asking], slots, [0, 0], [2, 6], [True, False], *grown),
                Step(1, [], slots, [2, 6], [1, 3], [True, True], [], [], []),
                Step(2, [], [Slot(0)], [3], [1], [True], [], [], []),
            )
        ]
        assert [bool(output.logprobs) for output in outputs] == [False, True, False]
        assert outputs[1].logprobs[0] is None
        entry = outputs[1].logprobs[1]
        answers.append(([output.token_ids for output in outputs], entry.rank, entry.top_ids))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "options",
    (
        {"max_num_seqs": 1},
        {"max_num_seqs": 5, "max_num_batched_tokens": 3},
        {"max_model_len": 30, "num_gpu_blocks_override": 8},
        {"max_num_seqs": 9, "max_num_batched_tokens": 40, "num_gpu_blocks_override": 30},
    ),
    ids=str,
)
def test_limits_of_any_size(
    tmp_path: Path, options: dict[str, int], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more new blocks than a message holds, and nothing in what is allocated."""
    monkeypatch.setattr(gpu_runner, "MAX_GROWTHS", 2)
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    plain, ours = workers(tmp_path, **options)
    wanted = soak(plain, block_size=BLOCK_SIZE, steps=11, depth=2, seed=1)
    assert sum(map(len, wanted.values())) > 10
    assert soak(ours, block_size=BLOCK_SIZE, steps=11, depth=2, seed=1) == wanted


def test_as_many_steps_in_flight_as_there_are_buffers(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    plain, ours = workers(tmp_path)
    depth = gpu_runner.RING
    wanted = soak(plain, block_size=BLOCK_SIZE, steps=12, depth=depth)
    assert soak(ours, block_size=BLOCK_SIZE, steps=12, depth=depth) == wanted


def test_experts_do_not_notice_what_padding_holds(
    tmp_path: Path, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "blocks_for", lambda *_: moe.Blocks(4, 16, 16, 1, 2, 2))
    tiny_checkpoint("mixtral", tmp_path, num_hidden_layers=1, vocab_size=97, num_local_experts=4)
    plain, _ = workers(tmp_path)
    monkeypatch.setattr(Cpu, "experts", experts_of_a_gpu)
    _, ours = workers(tmp_path)
    wanted = soak(plain, block_size=BLOCK_SIZE, steps=7, depth=2)
    assert soak(ours, block_size=BLOCK_SIZE, steps=7, depth=2) == wanted


def experts_of_a_gpu(device: Device, weights: ExpertWeights) -> moe.GpuExperts:
    w, how = weights, {"act": weights.act, "limit": weights.limit}
    return moe.GpuExperts.of(w.up, w.down, w.up_bias, w.down_bias, **how)


@pytest.mark.parametrize(
    "options", ({}, {"max_num_seqs": 9, "max_num_batched_tokens": 40}), ids=str
)
def test_the_plan_counts_what_the_runner_keeps(tmp_path: Path, options: dict[str, int]) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    _, ours = workers(tmp_path, **options)
    info = ours.info
    limits = Limits(info.max_num_seqs, info.max_num_batched_tokens, info.max_model_len)
    outline = permanent(limits, 97, [2], BLOCK_SIZE, torch.device("meta"))
    cache = (info.num_blocks + 1) * block_bytes(ours._model.spec, BLOCK_SIZE, torch.float32)
    weights = tensor_bytes(ours._model)
    assert tensor_bytes(outline) > 0
    # The cache's layers are views; of one layer, its bytes are all.
    held = tensor_bytes([ours._memory, ours._sampler, ours._model])
    assert held == tensor_bytes(outline) + cache + weights


def test_steps_that_break_off_change_no_token(tmp_path: Path, poisoned: None) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    plain, ours = workers(tmp_path)
    requests = requests_of(plain, 8, seed=3)
    wanted, _ = serve(plain, requests, block_size=BLOCK_SIZE, depth=2)
    decoder = ours._model.decoder
    breaking = Breaking(decoder, now_and_then(0.06, seed=1))
    ours._stages.decoder = ours._prompts._decoder = breaking
    got, _ = serve(ours, requests, block_size=BLOCK_SIZE, depth=2)
    assert breaking.num_broken > 3 and not got.failed
    assert got.written == wanted.written and got.finished == wanted.finished


def test_a_prompt_as_long_as_the_context(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    prompt = [(7 * i) % 97 for i in range(32)]
    join = Join(Slot(2), prompt, 32, SamplingParams(temperature=0.0), seed=1)
    drawn = []
    for worker in workers(tmp_path):
        for start, count in ((0, 12), (12, 12), (24, 8)):
            joins = [] if start else [join]
            blocks = [BlockId(i) for i in range(start // BLOCK_SIZE, (start + count) // BLOCK_SIZE)]
            grown = [[Slot(2)] * len(blocks), [int(block) for block in blocks], blocks]
            step = Step(0, joins, [Slot(2)], [start], [count], [start == 24], *grown)
            output = worker.launch(step).result()
        drawn.append(output.token_ids)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 1


PARAMETERS = (
    {"top_k": 1 << 30, "temperature": 100.0},
    {"top_k": 98},
    {"top_k": 1},
    {"top_p": 0.0, "temperature": 2.0},
    {"top_p": 1e-6, "top_k": 5},
    {"min_p": 1.0, "temperature": 50.0},
    {"min_p": 1.0, "top_p": 0.5, "top_k": 3, "temperature": 0.02},
    {"temperature": 1e-5},
    {"temperature": 9e-6},
    {"logit_bias": {i: -100.0 for i in range(90)}, "temperature": 1.5},
    {"logit_bias": {5: 100.0}, "temperature": 0.0},
    {"logit_bias": {i: 100.0 - i for i in range(97)}, "min_tokens": 9, "stop_token_ids": [0, 1, 0]},
    {"min_tokens": 2, "stop_token_ids": list(range(80)), "temperature": 1.3, "top_k": 40},
    {"min_tokens": 9, "ignore_eos": True, "temperature": 1.0},
    {"min_tokens": 9, "ignore_eos": True, "stop_token_ids": [3], "temperature": 0.0},
    {"repetition_penalty": 10.0, "temperature": 0.0},
    {"repetition_penalty": 0.01, "temperature": 0.3},
    {"presence_penalty": 2.0, "frequency_penalty": -2.0, "temperature": 0.8, "top_p": 0.9},
    {"presence_penalty": -2.0, "repetition_penalty": 1.7, "logit_bias": {4: 3.0}, "min_p": 0.01},
    {"frequency_penalty": 2.0, "temperature": 0.0},
    {},
)
SEEDS = (-(1 << 63), (1 << 63) - 1, -1, 0, 12345)


def test_every_parameter_means_what_it_means_on_a_cpu(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    plain, ours = workers(tmp_path)
    for first in range(0, len(PARAMETERS), 3):
        joins = [
            Join(Slot(at), [first + at, 2, 2], 3, SamplingParams(**some), seed=SEEDS[first % 5])
            for at, some in enumerate(PARAMETERS[first : first + 3])
        ]
        assert drawn_by(ours, joins) == drawn_by(plain, joins), PARAMETERS[first : first + 3]


def drawn_by(worker: Worker, joins: list[Join]) -> list[list[int]]:
    """What three sequences of three tokens draw in five steps, all launched at once; the first has
    given up its buffers to the last and is never asked."""
    slots = [join.slot for join in joins]
    blocks = [BlockId(i) for i in range(6)]
    grown = [[slot for slot in slots for _ in range(2)], [0, 1] * 3, blocks]
    launched = [worker.launch(Step(0, joins, slots, [0] * 3, [3] * 3, [True] * 3, *grown))]
    for at in range(3, 7):
        step = Step(at, [], slots, [at] * 3, [1] * 3, [True] * 3, [], [], [])
        launched.append(worker.launch(step))
    outputs = [each.result() for each in launched[-gpu_runner.RING :]]
    assert not any(output.failed for output in outputs)
    return [output.token_ids for output in outputs]


def logprobs_of(worker: Worker, prompt: list[int], params: object) -> list:
    slot, count = Slot(1), len(prompt)
    join = Join(slot, prompt, count, params, seed=7)
    blocks = [BlockId(i) for i in range(-(-(count + 1) // BLOCK_SIZE))]
    grown = [[slot] * len(blocks), list(range(len(blocks))), blocks]
    first = worker.launch(Step(0, [join], [slot], [0], [count], [True], *grown)).result()
    second = worker.launch(Step(1, [], [slot], [count], [1], [True], [], [], [])).result()
    return [*first.prompt_logprobs[slot], *first.logprobs, *second.logprobs]
