"""The runner on a GPU: everything a step needs is there already, but for one small message.

    launch   joins into their rows ─▶ message ─▶ stage (a graph) ─▶ results towards the host
    result   wait for them: one step behind, while the next one runs

The host never waits for the device before `result`. Messages and results have a ring of pinned
buffers, so that a step in flight is not written over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pagedserve.attention.base import AttentionBackend
from pagedserve.config import Config
from pagedserve.device import Device
from pagedserve.kernels.sample_gpu import Needs
from pagedserve.kernels.step_inputs import HEADER, Inputs, Message
from pagedserve.models.loading import LoadedModel
from pagedserve.request import SamplingParams
from pagedserve.step import BlockId, EngineInfo, Join, Slot, Step, StepOutput, TokenLogprobs
from pagedserve.worker import kv_cache
from pagedserve.worker.gpu_sampler import GpuSampler
from pagedserve.worker.prompt_logprobs import PromptLogprobs, by_slot
from pagedserve.worker.results import Results
from pagedserve.worker.sampler import NOT_FINITE, LogprobColumns
from pagedserve.worker.sizes import Limits, Size
from pagedserve.worker.stages import Memory, Stages

RING = 4  # steps whose buffers are in use: more than are ever in flight
MAX_GROWTHS = 8192  # of one message; what is beyond goes in a copy of its own
WARM_ROWS = (1, 8, 32)  # numbers of rows that kernels differ by
EVERY_NEED = [
    Needs(drawn, filtered, processed)
    for processed in (False, True)
    for drawn, filtered in ((False, False), (True, False), (True, True))
]


@dataclass(slots=True)
class Buffers:
    """One step's memory on the host, pinned. `message` as torch and as numpy sees it."""

    message: Tensor
    numbers: NDArray[np.int32]
    results: Tensor
    done: torch.cuda.Event


@dataclass(slots=True)
class GpuStep:
    """A launched step: what of its rows was asked for, and where the results will be."""

    buffers: Buffers
    layout: Results
    sampled: list[int] | None  # rows that draw; None: all of the step
    slots: list[Slot]  # theirs
    wanted: list[int | None]  # log-probabilities of so many tokens; may be empty for nobody
    prompt: list[tuple[Slot, LogprobColumns]]

    def result(self) -> StepOutput:
        """Wait, and read the tokens."""
        self.buffers.done.synchronize()
        drawn, finite = self.layout.drawn(self.buffers.results).tolist()
        if self.sampled is None:
            drawn, finite = drawn[: len(self.slots)], finite[: len(self.slots)]
        else:
            drawn = [drawn[row] for row in self.sampled]
            finite = [finite[row] for row in self.sampled]
        output = StepOutput(drawn)
        if not all(finite):
            output.failed.update(
                (slot, NOT_FINITE)
                for slot, good in zip(self.slots, finite, strict=True)
                if not good
            )
        if any(count is not None for count in self.wanted):  # who asked may not draw yet
            output.logprobs.extend(self._logprobs())
        output.prompt_logprobs.update(by_slot(self.prompt))
        return output

    def _logprobs(self) -> list[TokenLogprobs | None]:
        """Of the rows that draw, in their order."""
        places = [at for at, count in enumerate(self.wanted) if count is not None]
        rows = places if self.sampled is None else [self.sampled[at] for at in places]
        counts = [self.wanted[at] for at in places]
        most = max(count for count in counts if count is not None)
        scores, index = self.layout.scores(self.buffers.results), torch.tensor(rows)
        columns = LogprobColumns(
            scores.logprobs[index],
            scores.ranks[index],
            scores.top_ids[index, :most],
            scores.top_logprobs[index, :most],
            counts,
        )
        entries: list[TokenLogprobs | None] = [None] * len(self.slots)
        for place, entry in zip(places, columns.to_entries(), strict=True):
            entries[place] = entry
        return entries


@dataclass(frozen=True, slots=True)
class Rows:
    """What a runner keeps on the GPU beside weights and cache."""

    memory: Memory
    sampler: GpuSampler


def permanent(
    limits: Limits,
    vocab_size: int,
    eos_token_ids: list[int],
    block_size: int,
    device: torch.device,
) -> Rows:
    """Rows of no sequence yet, and no cache. On the meta device, to be counted."""
    rows, tokens = limits.sizes.largest()
    slots, length = limits.max_num_seqs + 1, limits.max_model_len + 1
    blocks = -(-length // block_size)
    layout = Message(rows, MAX_GROWTHS)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    memory = Memory(
        token_ids=zeros(slots, length, dtype=torch.int64),
        block_tables=zeros(slots, blocks),
        message=zeros(layout.size),
        layout=layout,
        inputs=Inputs.on(device, rows, tokens, blocks),
        results=zeros(Results(rows, scored=True).size),
        kv=[],
        block_size=block_size,
        scratch_block=0,
    )
    return Rows(memory, GpuSampler(memory.token_ids, rows, vocab_size, eos_token_ids))


class GpuRunner:
    """Model, cache, permanent rows and stages on one GPU."""

    def __init__(
        self,
        config: Config,
        device: Device,
        model: LoadedModel,
        info: EngineInfo,
        backend: AttentionBackend,
    ):
        self.info = info
        self._model, self._place, self._device = model, device, device.torch
        self._pins = self._device.type == "cuda"  # not in Triton's interpreter
        limits = Limits(info.max_num_seqs, info.max_num_batched_tokens, info.max_model_len)
        block_size = config.cache.block_size
        kv = kv_cache.allocate(
            model.spec, info.num_blocks + 1, block_size, model.dtype, self._device
        )
        rows = permanent(
            limits, model.spec.vocab_size, info.eos_token_ids, block_size, device.torch
        )
        # The scratch slot's only block is the last one.
        self._memory = replace(rows.memory, kv=kv, scratch_block=info.num_blocks)
        self._memory.block_tables[-1] = info.num_blocks
        self._sampler, layout = rows.sampler, self._memory.layout
        self._stages = Stages(
            self._memory,
            model.decoder,
            backend,
            self._sampler,
            limits.sizes,
            eager=config.scheduler.enforce_eager,
        )
        self._prompts = PromptLogprobs(self._memory.token_ids, model.decoder)
        self._ring = [self._buffers(layout, layout.rows) for _ in range(RING)]
        self._at = 0

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Of steps of all sizes, and of every kind of sampling."""
        self._stages.rehearse(self._stages.sizes.sample(), EVERY_NEED)

    def warm_up(self) -> None:
        """Run what the first requests run: one-token steps of a few sizes, and a prompt."""
        # Kernels read weights before they wait for those in front of them (`kernels.launch`).
        torch.cuda.synchronize(self._device)
        slots = self.info.max_num_seqs
        for rows in sorted({min(rows, slots) for rows in WARM_ROWS}):
            self._run_empty([2] * rows, 1)
        self._run_empty([min(2, self.info.max_model_len)], 2)
        torch.cuda.synchronize(self._device)

    def _run_empty(self, lengths: list[int], count: int) -> None:
        """A step of rows that all compute on block 0, whose content means nothing afterwards."""
        params = SamplingParams(temperature=0.0, max_tokens=1)
        slots = [Slot(i) for i in range(len(lengths))]
        joins = [
            Join(slot, [0] * length, length, params, seed=0)
            for slot, length in zip(slots, lengths, strict=True)
        ]
        counts = [count] * len(slots)
        blocks = [BlockId(0)] * len(slots)
        step = Step(
            0,
            joins,
            slots,
            [0] * len(slots),
            counts,
            [True] * len(slots),
            slots,
            [0] * len(slots),
            blocks,
        )
        self.launch(step).result()

    @torch.inference_mode()
    def launch(self, step: Step) -> GpuStep:
        """Enqueue one step: forward, sampling, and the write-back of what was sampled."""
        for join in step.joins:
            self._join(join)
        size = self._stages.sizes.of(len(step.slots), step.num_tokens)
        buffers = self._ring[self._at]
        self._at = (self._at + 1) % RING
        self._send(step, size, buffers)
        needs = self._sampler.needs(step.slots)
        # In a step of standing decode rows all draw: nothing is picked out for each of them.
        sampled, slots = None, step.slots
        if not all(step.samples):
            sampled = [row for row, samples in enumerate(step.samples) if samples]
            slots = [step.slots[row] for row in sampled]
        prompt = []
        if self._prompts.wanted and not self._prompts.wanted.keys().isdisjoint(step.slots):
            # Op by op: a graph keeps nothing of the hidden states that these are taken from.
            made = self._stages.compute(size, needs)
            prompt = self._prompts.of(step, list(range(len(step.slots))), made.hidden)
        else:
            self._stages.run(size, needs)
        layout, wanted = Results(size.rows, needs.scored), self._sampler.wanted
        used = layout.size
        buffers.results[:used].copy_(self._memory.results[:used], non_blocking=True)
        buffers.done.record()
        counts = [wanted.get(slot) for slot in slots] if needs.scored else []
        return GpuStep(buffers, layout, sampled, slots, counts, prompt)

    def recover(self) -> None:
        """See `start.Worker`. Graphs hold memory that a step run op by op may need.

        Memory comes first: where there is none, not even a kernel can be launched.
        """
        self._place.wait()
        self._stages.drop_graphs()
        self._place.give_back()
        self._place.clear()

    def _join(self, join: Join) -> None:
        """A sequence's tokens and parameters into its row."""
        # Pinned, or the copy would wait for the step before this one.
        tokens = torch.tensor(join.token_ids, dtype=torch.int64, pin_memory=self._pins)
        row = self._memory.token_ids[join.slot, : len(tokens)]
        row.copy_(tokens, non_blocking=True)
        self._sampler.set(join)
        self._prompts.remember(join)

    def _send(self, step: Step, size: Size, buffers: Buffers) -> None:
        """What the stage reads of this step, in one copy."""
        layout, numbers = self._memory.layout, buffers.numbers
        rows, growths = len(step.slots), len(step.grown_slots)
        if growths > layout.growths:
            self._grow(step)
            growths = 0
        numbers[:2] = rows, growths
        columns = numbers[HEADER : HEADER + 4 * layout.rows].reshape(4, layout.rows)
        columns[0, :rows] = step.slots
        columns[1, :rows] = step.starts
        columns[2, :rows] = step.counts
        columns[2, rows:] = 0 if size.mixed else 1
        columns[3, :rows] = step.samples
        used = layout.used(growths)
        if growths:
            grown = numbers[layout.used(0) : used].reshape(-1, 3)
            grown[:, 0] = step.grown_slots
            grown[:, 1] = step.grown_index
            grown[:, 2] = step.grown_blocks
        self._memory.message[:used].copy_(buffers.message[:used], non_blocking=True)

    def _grow(self, step: Step) -> None:
        """More new blocks than a message holds."""
        grown = [step.grown_slots, step.grown_index, step.grown_blocks]
        columns = torch.tensor(grown, pin_memory=self._pins)
        slots, index, blocks = columns.to(self._device, non_blocking=True)
        self._memory.block_tables[slots, index] = blocks.int()

    def _buffers(self, layout: Message, rows: int) -> Buffers:
        message = torch.zeros(layout.size, dtype=torch.int32, pin_memory=True)
        results = torch.zeros(Results(rows, scored=True).size, dtype=torch.int32, pin_memory=True)
        return Buffers(message, message.numpy(), results, torch.cuda.Event())  # type: ignore[no-untyped-call]
