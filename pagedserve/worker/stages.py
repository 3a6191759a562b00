"""A whole step on a GPU, from its message to its tokens, for a fixed number of rows and tokens.

    make inputs ─▶ embed ─▶ layers ─▶ last rows ─▶ head ─▶ sample ─▶ append

Everything between is static memory or the stage's own, no shape depends on what a step holds, and
nothing asks the host; so a stage is captured as one CUDA graph and replayed. A step takes the
smallest stage that holds it, and pads. The same stage run op by op is the oracle of its graph.

    one-token stages    R rows, R tokens                  decode
    mixed stages        R rows, T tokens, any counts      prefill, chunks, decode beside them
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pagedserve.attention.base import AttentionBackend
from pagedserve.attention.batch import Batch
from pagedserve.kernels import step_inputs
from pagedserve.kernels.rehearsal import rehearsal
from pagedserve.kernels.sample_gpu import Needs
from pagedserve.kernels.step_inputs import Inputs, Message
from pagedserve.models.base import Model
from pagedserve.worker.faults import is_memory
from pagedserve.worker.gpu_sampler import GpuSampler
from pagedserve.worker.results import Results
from pagedserve.worker.sizes import Size, Sizes

log = logging.getLogger("pagedserve")

MAX_GRAPHS = 400  # the driver keeps some of every graph in memory that no plan counts
PAUSE_RUNS = 1000  # without captures, after one for which there was no memory
SEEN_BEFORE_CAPTURE = 1  # runs of a stage before it is worth a graph; the first also warms it up


@dataclass(frozen=True, slots=True)
class Memory:
    """What all stages share, all of it permanent. The last slot is the scratch slot."""

    token_ids: Tensor  # [S, L] int64
    block_tables: Tensor  # [S, W] int32
    message: Tensor  # [layout.size] int32
    layout: Message
    inputs: Inputs
    results: Tensor  # int32, see `worker.results`
    kv: list[Tensor]
    block_size: int
    scratch_block: int


@dataclass(slots=True)
class Stage:
    """`graph`: once it is captured; `runs`: before that."""

    size: Size
    needs: Needs
    graph: torch.cuda.CUDAGraph | None = None
    runs: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """Of one step run op by op: hidden states of all tokens [T, C], logits of all rows [R, V]."""

    hidden: Tensor
    logits: Tensor


@dataclass(slots=True)
class Stages:
    """Makes, captures and runs them. `eager`: never captures."""

    memory: Memory
    decoder: Model
    backend: AttentionBackend
    sampler: GpuSampler
    sizes: Sizes
    eager: bool
    known: dict[tuple[Size, Needs], Stage] = field(default_factory=dict)
    pool: Any = None  # what torch calls a handle
    num_graphs: int = 0
    num_runs: int = 0
    capture_from: int = 0  # no graph before this run

    def worth_a_graph(self, stage: Stage) -> bool:
        """Whether the stage's next run is to be captured."""
        return (
            not self.eager
            and self.num_runs >= self.capture_from
            and stage.runs >= SEEN_BEFORE_CAPTURE
            and self.num_graphs < MAX_GRAPHS
            and self.decoder.capturable
        )

    def run(self, size: Size, needs: Needs) -> None:
        """Enqueue a step whose message is in `memory.message`."""
        self.num_runs += 1
        stage = self.known.get((size, needs))
        if stage is None:
            stage = self.known[size, needs] = Stage(size, needs)
        if stage.graph is not None:
            stage.graph.replay()
        elif self.worth_a_graph(stage):
            self.capture_or_compute(stage)
        else:
            stage.runs += 1
            self.compute(size, needs)

    def capture_or_compute(self, stage: Stage) -> None:
        """Run the stage as a graph; op by op where no graph of it can be made.

        Nothing of a step is computed while it is captured, so it is not lost. Graphs that there are
        still serve. Memory may come back, what may not be captured stays so.
        """
        stream = torch.cuda.current_stream()
        try:
            stage.graph = self.capture(stage)
            self.num_graphs += 1
        except RuntimeError as error:
            # A capture that fails leaves its own stream as the current one.
            torch.cuda.set_stream(stream)
            self.give_up(stage, error)
            self.compute(stage.size, stage.needs)
            return
        stage.graph.replay()

    def give_up(self, stage: Stage, error: RuntimeError) -> None:
        """Capture nothing for a while, or any more, and say so."""
        if is_memory(error):
            self.capture_from = self.num_runs + PAUSE_RUNS
            log.warning(
                "no memory for a CUDA graph of %s: for %d steps, those without one run op by op, "
                "slower. Where this comes again, lower --gpu-memory-utilization: %s",
                stage.size,
                PAUSE_RUNS,
                error,
            )
            return
        self.eager = True
        log.warning(
            "no more CUDA graphs, steps of other sizes run op by op and slower: %s could not be "
            "captured: %s. --enforce-eager does without graphs",
            stage.size,
            error,
        )

    def drop_graphs(self) -> None:
        """Give their memory back; none may be running. Each is captured again when it is needed."""
        for stage in self.known.values():
            stage.graph = None
        self.pool = None
        self.num_graphs = 0

    def rehearse(self, sizes: Iterable[Size], needs: Iterable[Needs]) -> None:
        """Compile the kernels of steps of these sizes, and of what else rows may need of a sampler.

        Nothing is computed: the steps are captured as a graph that nobody replays, of a model with
        one layer of each kind. Where that fails, kernels are compiled as they are needed.
        """
        if not self.decoder.capturable:
            return
        short = replace(self, decoder=self.decoder.excerpt(), known={})
        usual, *others = needs
        stream = torch.cuda.current_stream()
        # It takes memory of its own, which a capture must not.
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        try:
            with rehearsal(), torch.cuda.graph(graph, capture_error_mode="relaxed"):
                for size in sizes:
                    made = short.compute(size, usual)
                inputs = self.memory.inputs.cut(size.rows, size.tokens)
                for each in others:
                    self.sampler.sample(made.logits, inputs.slots, inputs.places, each)
                scores = Results(size.rows, scored=True).scores(self.memory.results)
                self.sampler.score(made.logits, inputs.places, inputs.slots, scores)
        except Exception as error:  # of a compiler, of a driver: the first steps will say it again
            torch.cuda.set_stream(stream)
            log.warning("kernels are compiled when they are first needed: %s", error)

    def capture(self, stage: Stage) -> torch.cuda.CUDAGraph:
        """Record the stage as a graph.

        Nothing that it makes is kept, so that all graphs share the memory of the largest.
        """
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):
            self.compute(stage.size, stage.needs)
        return graph

    def compute(self, size: Size, needs: Needs) -> Made:
        """The whole step, op by op."""
        memory = self.memory
        inputs = memory.inputs.cut(size.rows, size.tokens)
        step_inputs.make_inputs(
            memory.message,
            memory.layout,
            inputs,
            memory.token_ids,
            memory.block_tables,
            page=memory.block_size,
            scratch_block=memory.scratch_block,
        )
        batch = batch_of(size, inputs, memory.block_size)
        plan = self.backend.plan(batch)
        hidden = self.decoder.forward(batch, memory.kv, self.backend, plan)
        last = hidden[inputs.last] if size.mixed else hidden
        logits = self.decoder.head_logits(last)
        drawn, finite = self.sampler.sample(logits, inputs.slots, inputs.places, needs)
        results = Results(size.rows, needs.scored)
        if needs.scored:
            scores = results.scores(memory.results)
            self.sampler.score(logits, drawn, inputs.slots, scores)
        tokens = results.drawn(memory.results)
        step_inputs.append(drawn, finite, inputs, memory.token_ids, tokens)
        return Made(hidden, logits)


def batch_of(size: Size, inputs: Inputs, block_size: int) -> Batch:
    """What models and backends see. Counts on the host only say what kinds of rows there may be."""
    counts, num_decodes = [1] * size.rows, size.rows
    if size.mixed:
        counts, num_decodes = [1] + [2] * (size.rows - 1), 1
    return Batch(
        input_ids=inputs.input_ids,
        positions=inputs.positions,
        slot_mapping=inputs.slot_mapping,
        block_tables=inputs.block_tables,
        seq_lens=inputs.seq_lens,
        query_start_loc=inputs.query_start_loc,
        counts=counts,
        lens=counts,
        num_decodes=num_decodes,
        block_size=block_size,
    )
