"""A worker whose memory runs out in the middle of steps gives everybody the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pagedserve.config import Config
from pagedserve.device import pick
from pagedserve.engine import isolation
from pagedserve.models.loading import LoadedModel, load_model
from pagedserve.request import Request
from pagedserve.worker.start import Worker, make, settle
from tests.checkpoints import tiny_checkpoint
from tests.worker.breaking import Breaking, now_and_then, poisoned, requests_of, serve

BLOCK_SIZE = 4
LIMITS = {
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 70,
    "max_model_len": 120,
    "num_gpu_blocks_override": 60,  # fewer than all need: preemption
    "device": "cpu",
}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error budget that does not end."""
    monkeypatch.setattr(isolation, "MAX_FAILURES", 1 << 30)


def worker_of(directory: Path, model: LoadedModel) -> Worker:
    config = Config.from_options({"model": str(directory), **LIMITS})
    device = pick("cpu")
    return make(config, device, model, replace(settle(config, device, model), eos_token_ids=[2]))


def loaded(directory: Path) -> LoadedModel:
    tiny_checkpoint("llama", directory, num_hidden_layers=2, vocab_size=97)
    return load_model(directory, device=pick("cpu"), context=120)


@pytest.mark.parametrize("depth", (1, 2))
def test_memory_that_is_short_now_and_then_changes_no_token(
    depth: int, tmp_path: Path, patient: None
) -> None:
    model = loaded(tmp_path)
    plain = worker_of(tmp_path, model)
    requests = requests_of(plain, 14, seed=depth)
    wanted, _ = serve(plain, requests, block_size=BLOCK_SIZE, depth=depth)
    breaking = Breaking(model.decoder, now_and_then(0.05, depth))
    worker = worker_of(tmp_path, replace(model, decoder=breaking))
    got, scheduler = serve(worker, requests, block_size=BLOCK_SIZE, depth=depth)
    assert breaking.num_broken > 10
    both = (wanted, got)
    assert not wanted.failed and len(got.failed) <= 1, "alone, three times in a row, by chance"
    for request in requests:
        if request.id not in got.failed:
            assert got.written[request.id] == wanted.written[request.id]
            assert got.scores.get(request.id) == pytest.approx(wanted.scores.get(request.id))
            ranks = [[entry.rank for entry in each.entries.get(request.id, [])] for each in both]
            assert ranks[0] == ranks[1]
    assert scheduler.num_steps and sum(map(len, got.written.values())) > 200


def test_a_request_that_cannot_be_computed_fails_alone(tmp_path: Path, patient: None) -> None:
    model = loaded(tmp_path)
    plain = worker_of(tmp_path, model)
    requests = [
        Request(
            each.id,
            [min(id, 95) for id in each.prompt_token_ids],
            each.params.replace(logit_bias={96: -100.0}),  # nobody writes the poison
            each.seed,
            0,
            each.arrival,
        )
        for each in requests_of(plain, 11, seed=5)
    ]
    wanted, _ = serve(plain, requests, block_size=BLOCK_SIZE, depth=2)
    requests[4].prompt_token_ids[-1] = 96
    breaking = Breaking(model.decoder, poisoned(96))
    worker = worker_of(tmp_path, replace(model, decoder=breaking))
    got, _ = serve(worker, requests, block_size=BLOCK_SIZE, depth=2)
    bad = requests[4].id
    assert got.failed == {bad: "it cannot be computed: ValueError: poison"}
    del wanted.written[bad]
    assert got.written == wanted.written


@pytest.mark.gpu
def test_graphs_are_dropped_and_captured_again_and_no_token_changes(
    tmp_path: Path, patient: None
) -> None:
    tiny_checkpoint("llama", tmp_path)
    config = Config.from_options(
        {"model": str(tmp_path), **LIMITS, "device": "cuda", "dtype": "float32"}
    )
    device = pick("cuda")
    model = load_model(tmp_path, dtype="float32", device=device, context=120)
    info = replace(settle(config, device, model), eos_token_ids=[2])
    plain = make(config, device, model, info)
    requests = requests_of(plain, 60, seed=4)
    wanted, _ = serve(plain, requests, block_size=BLOCK_SIZE, depth=2)
    breaking = Breaking(model.decoder, now_and_then(0.02, 4))
    worker = make(config, device, replace(model, decoder=breaking), info)
    got, _ = serve(worker, requests, block_size=BLOCK_SIZE, depth=2)
    assert breaking.num_broken > 5
    for request in requests:
        if request.id not in got.failed:
            assert got.written[request.id] == wanted.written[request.id]


@pytest.mark.gpu
def test_log_probabilities_out_of_graphs_are_those_of_the_same_steps_op_by_op(
    tmp_path: Path,
) -> None:
    tiny_checkpoint("llama", tmp_path, head_dim=64)
    device = pick("cuda")
    model = load_model(tmp_path, dtype="bfloat16", device=device, context=120)
    answers = []
    for eager in (False, True):
        options = {**LIMITS, "device": "cuda", "dtype": "bfloat16", "enforce_eager": eager}
        config = Config.from_options({"model": str(tmp_path), **options})
        worker = make(config, device, model, settle(config, device, model))
        requests = requests_of(worker, 40, seed=6)
        answers.append(serve(worker, requests, block_size=BLOCK_SIZE, depth=2)[0])
    assert answers[0].written == answers[1].written
    assert answers[0].entries == answers[1].entries and len(answers[0].entries) > 5
