"""From a configuration to a worker that is ready: device, model, limits that fit memory, cache."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pagedserve import attention
from pagedserve.config import Config
from pagedserve.device import Device, pick
from pagedserve.errors import StartupError
from pagedserve.models.loading import LoadedModel, load_configured
from pagedserve.models.telling import Tell
from pagedserve.step import EngineInfo, Step, StepOutput
from pagedserve.worker import memory
from pagedserve.worker.faults import is_memory
from pagedserve.worker.kv_cache import NoRoom
from pagedserve.worker.memory import MemoryPlan
from pagedserve.worker.runner import Runner
from pagedserve.worker.sizes import Limits

log = logging.getLogger("pagedserve")

GPU_LIMITS = Limits(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=0)
CPU_LIMITS = Limits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=0)
ATTEMPTS = 4  # to allocate what was planned
SPARE_SHARE = 0.04  # of what is free, that each attempt leaves alone beyond the last


class Launched(Protocol):
    """A step whose tokens may still be on the device."""

    def result(self) -> StepOutput:
        """Wait, and bring the tokens to the host."""
        ...


class Worker(Protocol):
    """Runs steps on one device."""

    info: EngineInfo

    def compile_kernels(self) -> None:
        """Have ready what steps of all usual kinds run, as far as that can be known."""
        ...

    def warm_up(self) -> None:
        """Run what the first requests would otherwise wait for."""
        ...

    def launch(self, step: Step) -> Launched:
        """Enqueue one step: forward, sampling, and the write-back of what was sampled."""
        ...

    def recover(self) -> None:
        """Get ready for another step after one that broke off; give back memory that can be.

        Raises what the device says where it computes no more.
        """
        ...


def start(config: Config, on_progress: Tell) -> Worker:
    """Load the model, settle limits against memory, allocate. Raises StartupError."""
    on_progress("start the device", config.model.device)
    device = pick(config.model.device)
    device.prepare()
    on_progress("load weights", f"{device.name}, {config.model.load_format}")
    try:
        model = load_configured(config.model, Path(config.model.model), device, on_progress)
    except Exception as error:
        if not is_memory(error):
            raise
        raise StartupError(
            f"no memory for the weights on {device.name}: {memory.shown(device.memory().free)} are "
            "free; free some memory, or take a smaller model or --dtype. pagedserve plan MODEL "
            "says how much a model needs"
        ) from error
    return fit(config, device, model, on_progress)


def fit(config: Config, device: Device, model: LoadedModel, on_progress: Tell) -> Worker:
    """A worker in the memory that is free.

    What is free is read once, and others may take of it before we have: then it is read again, and
    more is left alone each time. Raises StartupError where that comes to nothing.
    """
    for attempt in range(ATTEMPTS):
        plan = plan_memory(config, device, model, spare=attempt * SPARE_SHARE)
        for note in plan.notes:
            log.warning("%s", note)
        on_progress("allocate KV cache", f"{plan.num_blocks} blocks: {plan.line()}")
        try:
            return made(config, device, model, plan, on_progress)
        except Exception as error:
            if not isinstance(error, NoRoom) and not is_memory(error):
                raise
            cause = str(error)
        # Only now: the exception's frames held what there was.
        device.give_back()
        log.warning("what was planned could not be allocated (%s): %s", plan.line(), cause)
        if memory.asks_for_size(config):
            break
    raise StartupError(
        f"no memory: what was planned could not be allocated ({plan.line()}): {cause}. Free some "
        "memory, or lower --gpu-memory-utilization, --num-gpu-blocks-override or "
        "--kv-cache-memory-bytes"
    )


def made(
    config: Config,
    device: Device,
    model: LoadedModel,
    plan: MemoryPlan,
    on_progress: Tell,
) -> Worker:
    """Everything of the plan allocated, and the first steps run."""
    worker = make(config, device, model, info_of(plan, device, model))
    on_progress("compile kernels", "")
    worker.compile_kernels()
    if device.is_gpu:
        # Before somebody else takes it; and now, because a capture gives back what is not used.
        device.reserve(plan.step)
    on_progress("warm up", "")
    worker.warm_up()
    return worker


def make(config: Config, device: Device, model: LoadedModel, info: EngineInfo) -> Worker:
    """Whole steps on a GPU where everything can stay there, else op by op."""
    backend = attention.choose(device, model.spec, model.dtype, config.cache.block_size)
    if device.is_gpu and not backend.needs_lens:
        from pagedserve.worker.gpu_runner import GpuRunner

        return GpuRunner(config, device, model, info, backend)
    return Runner(config, device, model, info, backend)


def settle(config: Config, device: Device, model: LoadedModel) -> EngineInfo:
    """Limits that hold together: asked for, allowed by the model, and held by memory."""
    return info_of(plan_memory(config, device, model), device, model)


def plan_memory(
    config: Config, device: Device, model: LoadedModel, *, spare: float = 0.0
) -> MemoryPlan:
    """With what is free now, but for a share `spare` of it."""
    available = device.memory()
    free = int(available.free * (1 - spare))
    place = memory.Place(
        replace(available, free=free),
        device.is_gpu,
        attention.choose(device, model.spec, model.dtype, config.cache.block_size),
    )
    return memory.plan(config, model, place, GPU_LIMITS if device.is_gpu else CPU_LIMITS)


def info_of(plan: MemoryPlan, device: Device, model: LoadedModel) -> EngineInfo:
    """What the engine needs to know."""
    return EngineInfo(
        vocab_size=model.spec.vocab_size,
        max_model_len=plan.limits.max_model_len,
        num_blocks=plan.num_blocks,
        max_num_seqs=plan.limits.max_num_seqs,
        max_num_batched_tokens=plan.limits.max_num_batched_tokens,
        eos_token_ids=model.eos_token_ids,
        device=device.name,
        dtype=str(model.dtype).removeprefix("torch."),
        asynchronous=device.is_gpu,
    )
