"""The runner: a Step in, tokens out, on one device, op by op.

    launch:  apply what changed ─▶ batch ─▶ model over the paged cache ─▶ logits ─▶ sample
             └──────────────── rows (permanent state) ◀──── sampled tokens ──────────┘
    result:  the same tokens, on the host

`launch` only enqueues; on a device that runs asynchronously the host waits in `result`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.attention.base import AttentionBackend
from pagedserve.attention.batch import Batch
from pagedserve.config import Config
from pagedserve.device import Device
from pagedserve.models.loading import LoadedModel
from pagedserve.request import SamplingParams
from pagedserve.step import BlockId, EngineInfo, Join, Slot, Step, StepOutput
from pagedserve.worker import kv_cache
from pagedserve.worker.logits import Processors
from pagedserve.worker.prompt_logprobs import PromptLogprobs, by_slot
from pagedserve.worker.rows import Rows
from pagedserve.worker.sampler import NOT_FINITE, LogprobColumns, Sampled, Sampler


@dataclass(slots=True)
class LaunchedStep:
    """A step whose tokens may still be on the device."""

    sampled: Sampled | None
    slots: list[Slot]  # of the sampled rows, in the step's order
    prompt: list[tuple[Slot, LogprobColumns]]

    def result(self) -> StepOutput:
        """Wait, and bring the tokens to the host."""
        if self.sampled is None:
            output = StepOutput([])
        else:
            finite = self.sampled.finite.tolist()
            output = StepOutput(
                self.sampled.token_ids.tolist(),
                logprobs=self.sampled.logprobs.to_entries() if self.sampled.logprobs else [],
                failed={
                    slot: NOT_FINITE
                    for slot, good in zip(self.slots, finite, strict=True)
                    if not good
                },
            )
        output.prompt_logprobs.update(by_slot(self.prompt))
        return output


class Runner:
    """Model, cache and permanent rows on one device."""

    def __init__(
        self,
        config: Config,
        device: Device,
        model: LoadedModel,
        info: EngineInfo,
        backend: AttentionBackend,
    ):
        self.info = info
        self._model, self._device = model, device
        spec, where = model.spec, device.torch
        block_size = config.cache.block_size
        self._kv = kv_cache.allocate(spec, info.num_blocks, block_size, model.dtype, where)
        self._rows = Rows(info.max_num_seqs, info.max_model_len, block_size, where)
        processors = Processors(self._rows, spec.vocab_size, info.eos_token_ids, where)
        self._sampler = Sampler(info.max_num_seqs, processors, where)
        self._backend = backend
        self._prompts = PromptLogprobs(self._rows.token_ids, model.decoder)

    def compile_kernels(self) -> None:
        """They were compiled when the device was chosen."""

    def warm_up(self) -> None:
        """Run one small step, so that the first request does not pay for lazy set-up."""
        slot, params = Slot(0), SamplingParams(temperature=0.0, max_tokens=1)
        join = Join(slot, [0, 0], 2, params, seed=0)
        step = Step(0, [join], [slot], [0], [1], [True], [slot], [0], [BlockId(0)])
        self.launch(step).result()

    @torch.inference_mode()
    def launch(self, step: Step) -> LaunchedStep:
        """Enqueue one step: forward, sampling, and the write-back of what was sampled."""
        for join in step.joins:
            self._sampler.set(join)
            self._prompts.remember(join)
        self._rows.apply(step)
        batch, order = self._rows.batch(step)
        plan = self._backend.plan(batch)
        hidden = self._model.decoder.forward(batch, self._kv, self._backend, plan)
        prompt = self._prompts.of(step, order, hidden) if self._prompts.wanted else []
        return self._sample(step, order, batch, hidden, prompt)

    def recover(self) -> None:
        """See `start.Worker`. A row's state is written again by the step that is."""
        self._device.wait()
        self._device.give_back()
        self._device.clear()

    def _sample(
        self,
        step: Step,
        order: list[int],
        batch: Batch,
        hidden: Tensor,
        prompt: list[tuple[Slot, LogprobColumns]],
    ) -> LaunchedStep:
        place = {row: at for at, row in enumerate(order)}
        rows = [row for row in range(len(order)) if step.samples[row]]
        if not rows:
            return LaunchedStep(None, [], prompt)
        places = [place[row] for row in rows]
        if len(places) != hidden.shape[0]:  # else every row is one token, in the step's order
            index = batch.query_start_loc[1:][self._rows.upload(places)[0]] - 1
            hidden = hidden[index]
        slots = [step.slots[row] for row in rows]
        lengths = [step.starts[row] + step.counts[row] for row in rows]
        sampled = self._sampler.sample(self._model.decoder.logits(hidden), slots, lengths)
        slot, length = self._rows.upload(slots, lengths)
        self._rows.append(slot, length, sampled.token_ids)
        return LaunchedStep(sampled, slots, prompt)
