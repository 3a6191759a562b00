"""The runner: a Step in, tokens out, on one device.

    launch:  apply what changed ─▶ batch ─▶ model over the paged cache ─▶ logits ─▶ sample
             └──────────────── rows (permanent state) ◀──── sampled tokens ──────────┘
    result:  the same tokens, on the host

`launch` only enqueues; on a device that runs asynchronously the host waits in `result`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagedserve import attention
from pagedserve.attention.batch import Batch
from pagedserve.config import Config
from pagedserve.device import Device, pick
from pagedserve.models.loading import LoadedModel, load_model
from pagedserve.request import SamplingParams
from pagedserve.step import BlockId, EngineInfo, Join, Slot, Step, StepOutput, TokenLogprobs
from pagedserve.worker import kv_cache, memory
from pagedserve.worker.logits import Processors
from pagedserve.worker.rows import Rows
from pagedserve.worker.sampler import LogprobColumns, Sampled, Sampler, logprob_columns

GPU_LIMITS = memory.Limits(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=0)
CPU_LIMITS = memory.Limits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=0)
PROMPT_LOGITS_ROWS = 256  # positions whose logits are held at a time for prompt log-probabilities


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
                bad_slots=[s for s, good in zip(self.slots, finite, strict=True) if not good],
            )
        for slot, columns in self.prompt:
            entries: list[TokenLogprobs] = [e for e in columns.to_entries() if e is not None]
            output.prompt_logprobs.setdefault(slot, []).extend(entries)
        return output


class Runner:
    """Model, cache and permanent rows on one device."""

    def __init__(self, config: Config, device: Device, model: LoadedModel, info: EngineInfo):
        self.info = info
        self._model = model
        spec, where = model.spec, device.torch
        block_size = config.cache.block_size
        self._kv = kv_cache.allocate(spec, info.num_blocks, block_size, model.dtype, where)
        self._rows = Rows(info.max_num_seqs, info.max_model_len, block_size, where)
        processors = Processors(self._rows, spec.vocab_size, info.eos_token_ids, where)
        self._sampler = Sampler(info.max_num_seqs, processors, where)
        self._backend = attention.choose(device, spec, model.dtype, block_size)
        self._prompts: dict[Slot, tuple[int, int]] = {}  # prompt length and wanted top, by slot

    @classmethod
    def start(cls, config: Config, on_progress: Callable[[str, str], None]) -> Runner:
        """Load the model, settle limits against memory, allocate. Raises StartupError."""
        device = pick(config.model.device)
        device.prepare()
        on_progress("load weights", f"{device.name}, {config.model.load_format}")
        model = load_model(
            Path(config.model.model),
            dtype=config.model.dtype,
            device=device,
            load_format=config.model.load_format,
            seed=config.model.seed,
            context=config.model.max_model_len,
            hf_overrides=config.model.hf_overrides,
            model_impl=config.model.model_impl,
            architecture_file=config.model.architecture_file,
            generation_source=config.model.generation_config,
            generation_override=config.model.override_generation_config,
            on_progress=lambda detail: on_progress("load weights", detail),
        )
        info = settle(config, device, model)
        on_progress("allocate KV cache", f"{info.num_blocks} blocks")
        runner = cls(config, device, model, info)
        on_progress("warm up", "")
        runner.warm_up()
        return runner

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
            self._remember_prompt(join.slot, join.num_prompt, join.params.prompt_logprobs)
        self._rows.apply(step)
        batch, order = self._rows.batch(step)
        plan = self._backend.plan(batch)
        hidden = self._model.decoder.forward(batch, self._kv, self._backend, plan)
        prompt = self._prompt_logprobs(step, order, batch, hidden) if self._prompts else []
        return self._sample(step, order, batch, hidden, prompt)

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

    def _remember_prompt(self, slot: Slot, num_prompt: int, wanted: int | None) -> None:
        self._prompts.pop(slot, None)
        if wanted is not None:
            self._prompts[slot] = num_prompt, wanted

    def _prompt_logprobs(
        self, step: Step, order: list[int], batch: Batch, hidden: Tensor
    ) -> list[tuple[Slot, LogprobColumns]]:
        """Log-probabilities of prompt tokens that follow this step's positions, where asked for."""
        found = []
        first = 0
        for row in order:
            slot, start, count = step.slots[row], step.starts[row], step.counts[row]
            if slot in self._prompts:
                num_prompt, wanted = self._prompts[slot]
                end = min(start + count, num_prompt - 1)  # the last prompt token precedes output
                for at in range(start, end, PROMPT_LOGITS_ROWS):
                    stop = min(at + PROMPT_LOGITS_ROWS, end)
                    logits = self._model.decoder.logits(
                        hidden[first + at - start : first + stop - start]
                    )
                    targets = self._rows.token_ids[slot, at + 1 : stop + 1]
                    columns = logprob_columns(logits, targets, [wanted] * (stop - at))
                    found.append((slot, columns))
            first += count
        return found


def settle(config: Config, device: Device, model: LoadedModel) -> EngineInfo:
    """Limits that hold together: asked for, allowed by the model, and held by memory."""
    spec, asked = model.spec, config.scheduler
    default = GPU_LIMITS if device.is_gpu else CPU_LIMITS
    limits = memory.Limits(
        max_num_seqs=asked.max_num_seqs or default.max_num_seqs,
        max_num_batched_tokens=asked.max_num_batched_tokens or default.max_num_batched_tokens,
        max_model_len=model.max_model_len,
    )
    block_size = config.cache.block_size
    available = device.memory()
    num_blocks = memory.plan_blocks(
        config.cache,
        block_bytes=kv_cache.block_bytes(spec, block_size, model.dtype),
        workspace=memory.workspace_bytes(spec, limits, model.dtype.itemsize),
        free_bytes=available.free,
        total_bytes=available.total,
        on_gpu=device.is_gpu,
        limits=limits,
    )
    return EngineInfo(
        vocab_size=spec.vocab_size,
        # One sequence can never be longer than all blocks together.
        max_model_len=min(limits.max_model_len, num_blocks * block_size),
        num_blocks=num_blocks,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        eos_token_ids=model.eos_token_ids,
        device=device.name,
        dtype=str(model.dtype).removeprefix("torch."),
        asynchronous=device.is_gpu,
    )
