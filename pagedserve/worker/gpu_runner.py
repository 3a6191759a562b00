"""The runner on a GPU: everything a step needs is there already, but for one small message.

    launch   joins into their rows ─▶ message ─▶ stage (a graph) ─▶ results towards the host
    result   wait for them: one step behind, while the next one runs

The host never waits for the device before `result`. Messages and results have a ring of pinned
buffers, so that a step in flight is not written over.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from pagedserve.worker.sampler import NOT_FINITE, LogprobColumns, logprob_columns
from pagedserve.worker.stages import Memory, Size, Sizes, Stages

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
    rows: int  # of the stage
    sampled: list[int] | None  # rows that draw; None: all of the step
    slots: list[Slot]  # theirs
    logprobs: tuple[list[int], LogprobColumns] | None
    prompt: list[tuple[Slot, LogprobColumns]]

    def result(self) -> StepOutput:
        """Wait, and read the tokens."""
        self.buffers.done.synchronize()
        drawn, finite = self.buffers.results[: 2 * self.rows].view(2, -1).tolist()
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
        if self.logprobs is not None:
            places, columns = self.logprobs
            entries: list[TokenLogprobs | None] = [None] * len(self.slots)
            for place, entry in zip(places, columns.to_entries(), strict=True):
                entries[place] = entry
            output.logprobs.extend(entries)
        output.prompt_logprobs.update(by_slot(self.prompt))
        return output


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
        spec, block_size, slots = model.spec, config.cache.block_size, info.max_num_seqs + 1
        sizes = Sizes(info.max_num_seqs, info.max_num_batched_tokens)
        rows, tokens = sizes.largest()
        blocks = -(-(info.max_model_len + 1) // block_size)
        here = self._device
        tables = torch.zeros((slots, blocks), dtype=torch.int32, device=here)
        tables[-1] = info.num_blocks  # the scratch slot's only block
        layout = Message(rows, MAX_GROWTHS)
        self._memory = Memory(
            token_ids=torch.zeros((slots, info.max_model_len + 1), dtype=torch.int64, device=here),
            block_tables=tables,
            message=torch.zeros(layout.size, dtype=torch.int32, device=here),
            layout=layout,
            inputs=Inputs.on(here, rows, tokens, blocks),
            results=torch.zeros(2 * rows, dtype=torch.int32, device=here),
            kv=kv_cache.allocate(spec, info.num_blocks + 1, block_size, model.dtype, here),
            block_size=block_size,
            scratch_block=info.num_blocks,
        )
        self._sampler = GpuSampler(
            self._memory.token_ids, rows, spec.vocab_size, info.eos_token_ids
        )
        self._stages = Stages(
            self._memory,
            model.decoder,
            backend,
            self._sampler,
            sizes,
            eager=config.scheduler.enforce_eager,
        )
        self._prompts = PromptLogprobs(self._memory.token_ids, model.decoder)
        self._logprobs: dict[Slot, int] = {}
        self._ring = [self._buffers(layout, rows) for _ in range(RING)]
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
        found, prompt = None, []
        if self._wants_logprobs(step):
            # Op by op: a graph keeps nothing of what these are taken from.
            made = self._stages.compute(size, needs)
            found = self._find_logprobs(made.logits, sampled, slots)
            prompt = self._prompts.of(step, list(range(len(step.slots))), made.hidden)
        else:
            self._stages.run(size, needs)
        results = self._memory.results[: 2 * size.rows]
        buffers.results[: 2 * size.rows].copy_(results, non_blocking=True)
        buffers.done.record()
        return GpuStep(buffers, size.rows, sampled, slots, found, prompt)

    def recover(self) -> None:
        """See `start.Worker`. Graphs hold memory that a step run op by op may need."""
        self._place.recover()
        self._stages.drop_graphs()
        self._place.give_back()

    def _join(self, join: Join) -> None:
        """A sequence's tokens and parameters into its row."""
        # Pinned, or the copy would wait for the step before this one.
        tokens = torch.tensor(join.token_ids, dtype=torch.int64, pin_memory=self._pins)
        row = self._memory.token_ids[join.slot, : len(tokens)]
        row.copy_(tokens, non_blocking=True)
        self._sampler.set(join)
        self._prompts.remember(join)
        self._logprobs.pop(join.slot, None)
        if join.params.logprobs is not None:
            self._logprobs[join.slot] = join.params.logprobs

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

    def _wants_logprobs(self, step: Step) -> bool:
        """Whether any of the step's rows asked for log-probabilities, of its answer or prompt."""
        return not (
            self._logprobs.keys().isdisjoint(step.slots)
            and self._prompts.wanted.keys().isdisjoint(step.slots)
        )

    def _find_logprobs(
        self, logits: Tensor, sampled: list[int] | None, slots: list[Slot]
    ) -> tuple[list[int], LogprobColumns] | None:
        """Of the rows that asked for them, from the logits before any processor."""
        places = [at for at, slot in enumerate(slots) if slot in self._logprobs]
        if not places:
            return None
        of_step = places if sampled is None else [sampled[at] for at in places]
        rows = torch.tensor(of_step).to(self._device, non_blocking=True)
        drawn = self._memory.results[rows].long()
        wanted: list[int | None] = [self._logprobs[slots[at]] for at in places]
        return places, logprob_columns(logits[rows].float(), drawn, wanted)

    def _buffers(self, layout: Message, rows: int) -> Buffers:
        message = torch.zeros(layout.size, dtype=torch.int32, pin_memory=True)
        results = torch.zeros(2 * rows, dtype=torch.int32, pin_memory=True)
        return Buffers(message, message.numpy(), results, torch.cuda.Event())  # type: ignore[no-untyped-call]
