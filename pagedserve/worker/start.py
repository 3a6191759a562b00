"""From a configuration to a worker that is ready: device, model, limits that fit memory, cache."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pagedserve import attention
from pagedserve.config import Config
from pagedserve.device import Device, pick
from pagedserve.models.hub.progress import part
from pagedserve.models.loading import LoadedModel, load_model
from pagedserve.models.telling import Tell
from pagedserve.step import EngineInfo, Step, StepOutput
from pagedserve.worker import kv_cache, memory
from pagedserve.worker.runner import Runner

GPU_LIMITS = memory.Limits(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=0)
CPU_LIMITS = memory.Limits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=0)


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
        on_bytes=lambda done, total: on_progress(
            "load weights", f"{part(done, total)} ({100 * done // total} %)", done, total
        ),
    )
    info = settle(config, device, model)
    on_progress("allocate KV cache", f"{info.num_blocks} blocks")
    worker = make(config, device, model, info)
    on_progress("compile kernels", "")
    worker.compile_kernels()
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
    spec, asked = model.spec, config.scheduler
    default = GPU_LIMITS if device.is_gpu else CPU_LIMITS
    limits = memory.Limits(
        max_num_seqs=asked.max_num_seqs or default.max_num_seqs,
        max_num_batched_tokens=asked.max_num_batched_tokens or default.max_num_batched_tokens,
        max_model_len=model.max_model_len,
    )
    block_size = config.cache.block_size
    available = device.memory()
    itemsize = model.dtype.itemsize
    if device.is_gpu:
        workspace = memory.gpu_bytes(spec, limits, itemsize, block_size)
    else:
        workspace = memory.workspace_bytes(spec, limits, itemsize)
    num_blocks = memory.plan_blocks(
        config.cache,
        block_bytes=kv_cache.block_bytes(spec, block_size, model.dtype),
        workspace=workspace,
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
