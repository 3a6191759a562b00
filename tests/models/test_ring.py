"""Bytes reach a device whole and in time, however late it copies; what goes wrong is said."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pagedserve.device import Cpu, pick
from pagedserve.errors import StartupError
from pagedserve.kernels.matrix import Matrix, PlainMatrix
from pagedserve.models import loading, ring
from pagedserve.models.ring import Ring, pieces
from pagedserve.models.shards import Files, Stored, stored_tensors
from tests.checkpoints import tiny_checkpoint

Copy = tuple[Tensor, Tensor]


class LateDevice:
    """Copies nothing before somebody waits for it: so a buffer that is filled too early shows."""

    def __init__(self) -> None:
        self.queue: list[Copy] = []
        self.passed = 0  # copies that are done
        self.buffers: list[Tensor] = []
        self.thread = threading.get_ident()

    def buffer(self, num_bytes: int) -> Tensor:
        assert threading.get_ident() == self.thread
        self.buffers.append(torch.full((num_bytes,), 0xAA, dtype=torch.uint8))
        return self.buffers[-1]

    def copy(self, into: Tensor, buffer: Tensor) -> Passed:
        assert threading.get_ident() == self.thread and into.shape == buffer.shape
        self.queue.append((into, buffer))
        return Passed(self, len(self.queue))

    def run_to(self, end: int) -> None:
        while self.passed < end:
            into, buffer = self.queue[self.passed]
            into.copy_(buffer)
            self.passed += 1


class Passed:
    """The mark behind its copies up to `end`."""

    def __init__(self, device: LateDevice, end: int):
        self.device, self.end = device, end

    def synchronize(self) -> None:
        self.device.run_to(self.end)


class PromptDevice(LateDevice):
    """Copies at once, as everything else on a CPU happens at once."""

    def copy(self, into: Tensor, buffer: Tensor) -> Passed:
        mark = super().copy(into, buffer)
        mark.synchronize()
        return mark


def random_files(
    rng: random.Random, directory: Path
) -> tuple[dict[str, Stored], dict[str, Tensor]]:
    """Tensors of odd sizes in two files: some empty, many small ones, some of several buffers."""
    dtypes = (torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.float16)
    stored: dict[str, Stored] = {}
    tensors: dict[str, Tensor] = {}
    for part in ("a", "b"):
        (directory / part).mkdir()
        mine = {}
        for at in range(rng.randrange(1, 12)):
            size = rng.choice((0, 1, rng.randrange(2, 300), rng.randrange(1000, 60_000)))
            numbers = torch.randint(0, 2, (size,), dtype=torch.uint8)
            mine[f"{part}{at}"] = (numbers * torch.rand(size)).to(rng.choice(dtypes)).contiguous()
        save_file(mine, directory / part / "model.safetensors")
        stored |= stored_tensors(directory / part)
        tensors |= mine
    return stored, tensors


def small_ring(device: LateDevice, rng: random.Random) -> Ring:
    return Ring(
        device,
        threads=rng.randrange(1, 9),
        buffers=rng.randrange(1, 6),
        buffer_bytes=rng.choice((7, 512, 1000, 4096, 1 << 16)),
    )


@pytest.fixture
def fine_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "LEAST_PIECE", 300)
    monkeypatch.setattr(ring, "PAGE", 64)


@pytest.mark.parametrize("seed", range(12))
def test_every_byte_arrives_however_late_the_device_copies(
    seed: int, tmp_path: Path, fine_pieces: None
) -> None:
    rng = random.Random(os.urandom(8))
    stored, tensors = random_files(rng, tmp_path)
    device = LateDevice()
    reading = small_ring(device, rng)
    filled = {}
    for name in rng.sample(sorted(tensors), len(tensors)):
        filled[name] = torch.full_like(tensors[name], 1)
        reading.read(stored[name], filled[name], later=rng.random() < 0.6)
        if rng.random() < 0.2:
            reading.settle()
    reading.settle()
    reading.check()
    reading.close()
    assert device.passed == len(device.queue)
    for name, tensor in tensors.items():
        assert torch.equal(filled[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_after_its_read_a_tensor_is_behind_copies_that_are_enqueued(tmp_path: Path) -> None:
    """And nothing waited for the device while there were buffers."""
    save_file({"x": torch.randn(3000)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["x"]
    device, into = LateDevice(), torch.full((3000,), torch.nan)
    reading = Ring(device, threads=3, buffers=4, buffer_bytes=3500)
    reading.read(stored, into)
    assert sum(copied.numel() for copied, _ in device.queue) == 12_000 and device.passed == 0
    device.run_to(len(device.queue))
    assert not into.isnan().any()
    reading.close()


def test_a_part_of_a_tensor_is_read_from_its_byte_on(tmp_path: Path, fine_pieces: None) -> None:
    tensor = torch.randn(77, 13)
    save_file({"first": torch.zeros(3), "x": tensor}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["x"]
    reading, into = Ring(PromptDevice(), buffer_bytes=100), torch.empty(20, 13)
    reading.read(stored, into, skip=31 * 13 * 4)
    assert torch.equal(into, tensor[31:51])
    reading.close()


def test_memory_is_bounded_and_only_taken_as_it_is_needed(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(50_000), "y": torch.zeros(9)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    device = LateDevice()
    reading = Ring(device, buffers=3, buffer_bytes=1024)
    assert device.buffers == []
    reading.read(stored["y"], torch.empty(9))
    assert len(device.buffers) == 1
    reading.read(stored["x"], torch.empty(50_000))
    assert [len(each) for each in device.buffers] == [1024] * 3
    reading.close()


def test_pieces_cover_all_and_do_not_overlap() -> None:
    rng = random.Random(os.urandom(8))
    for _ in range(100):
        total, size = rng.randrange(0, 5000), rng.randrange(1, 700)
        found = list(pieces(total, size))
        assert [n for first, last in found for n in range(first, last)] == list(range(total))
        assert all(last - first == size for first, last in found[:-1])


Preadv = Callable[[int, list[memoryview], int], int]


def failing(real: Preadv, at: int, fault: str) -> Preadv:
    """preadv that goes wrong at its call number `at`, and reads in short parts before."""
    calls = iter(range(1_000_000))

    def preadv(fd: int, buffers: list[memoryview], position: int) -> int:
        if next(calls) >= at:
            if fault == "error":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return 0
        return real(fd, [buffers[0][: random.randrange(1, 400)]], position)

    return preadv


@pytest.mark.parametrize("fault", ("error", "end"))
@pytest.mark.parametrize("later", (False, True))
def test_a_fault_in_any_thread_ends_the_read_with_the_files_name(
    fault: str, later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fine_pieces: None
) -> None:
    save_file({"x": torch.randn(5000), "y": torch.randn(3)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    reading = Ring(LateDevice(), threads=4, buffers=5, buffer_bytes=900)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", failing(real, random.randrange(0, 40), fault))
    said = "Input/output error" if fault == "error" else "it ends at byte"
    with pytest.raises(StartupError, match=rf"model\.safetensors: {said}"):
        for name in ("x", "y"):
            reading.read(stored[name], torch.empty(stored[name].shape), later=later)
        reading.settle()
    # What was on its way is forgotten, no thread writes on, and the ring still works.
    monkeypatch.setattr(os, "preadv", real)
    reading.settle()
    into = torch.empty(5000)
    reading.read(stored["x"], into)
    reading.close()
    assert not into.isnan().any()
    # A pool takes its time to end its threads, but tells them to.
    for thread in threading.enumerate():
        if thread.name.startswith("weights"):
            thread.join(30)
            assert not thread.is_alive()


def test_another_file_in_its_place_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(50)}, path)
    stored = stored_tensors(tmp_path)["x"]
    save_file({"x": torch.randn(50)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    reading = Ring(LateDevice())
    with pytest.raises(StartupError, match=r"model\.safetensors: it is not the file"):
        reading.read(stored, torch.empty(50))
    reading.close()


def test_a_file_that_changes_while_it_is_read_is_named_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(50)}, path)
    stored, reading = stored_tensors(tmp_path)["x"], Ring(LateDevice())
    reading.read(stored, torch.empty(50))
    reading.check()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(1, 1))  # whatever the clock of the file system can tell apart
    with pytest.raises(StartupError, match=r"model\.safetensors was changed while it was read"):
        reading.check()
    reading.close()


FAMILIES = ("llama", "gpt2", "qwen2", "mixtral", "deepseek_v3")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_through_the_ring_is_the_same_to_the_bit(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fine_pieces: None
) -> None:
    directory = tiny_checkpoint(family, tmp_path)
    plain = tensors_in(loading.load_model(directory, device=pick("cpu"), dtype=dtype).decoder)
    device = PromptDevice()
    monkeypatch.setattr(loading, "Files", lambda: Ring(device, buffers=3, buffer_bytes=1500))
    ringed = tensors_in(loading.load_model(directory, device=pick("cpu"), dtype=dtype).decoder)
    assert len(plain) == len(ringed) > 5 and len(device.queue) > 10
    for one, other in zip(plain, ringed, strict=True):
        assert torch.equal(one, other)


class Unread(Cpu):
    """Keeps weights as they are, and looks at none."""

    takes_unread = True

    def matrix(self, weight: Tensor) -> Matrix:
        return PlainMatrix(weight)


@pytest.mark.parametrize("family", ("llama", "mixtral"))
def test_weights_that_nobody_looks_at_are_whole_once_the_model_is(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fine_pieces: None
) -> None:
    """Of a device that copies nothing before it must, while norms go past the matrices."""
    directory, place = tiny_checkpoint(family, tmp_path), Unread()
    plain = tensors_in(loading.load_model(directory, device=place).decoder)
    device = LateDevice()
    monkeypatch.setattr(loading, "Files", lambda: Ring(device, buffers=7, buffer_bytes=2000))
    ringed = tensors_in(loading.load_model(directory, device=place).decoder)
    assert device.passed == len(device.queue) > 50
    for one, other in zip(plain, ringed, strict=True):
        assert torch.equal(one, other)


def test_what_is_wanted_now_goes_past_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fine_pieces: None
) -> None:
    """Reading of the large tensor is held up until the small ones are there."""
    tensors = {"large": torch.randn(4000), "small": torch.randn(40), "odd": torch.randn(500)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored, go_on = stored_tensors(tmp_path), threading.Event()
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], position: int) -> int:
        begin = stored["large"].start
        if begin <= position < begin + stored["large"].num_bytes:
            assert go_on.wait(20)
        return real(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv)
    into = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    reading = Ring(PromptDevice(), threads=3, buffers=8, buffer_bytes=8000)
    reading.read(stored["large"], into["large"], later=True)
    for name in ("small", "odd"):
        reading.read(stored[name], into[name])
        assert torch.equal(into[name], tensors[name])
    assert into["large"].isnan().all()
    go_on.set()
    reading.settle()
    assert torch.equal(into["large"], tensors["large"])
    reading.close()


def tensors_in(found: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that can be reached from it, in a fixed order."""
    seen = set() if seen is None else seen
    if isinstance(found, Tensor):
        return [found]
    ours = type(found).__module__.startswith("pagedserve.")
    if id(found) in seen or not (ours or isinstance(found, dict | list | tuple)):
        return []
    seen.add(id(found))
    if isinstance(found, dict):
        inner = list(found.values())
    elif isinstance(found, list | tuple):
        inner = list(found)
    else:
        names = list(getattr(found, "__dict__", {})) + [
            name for kind in type(found).__mro__ for name in getattr(kind, "__slots__", ())
        ]
        inner = [getattr(found, name) for name in names if hasattr(found, name)]
    return [tensor for each in inner for tensor in tensors_in(each, seen)]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ("llama", "gpt2", "mixtral", "deepseek_v3"))
def test_a_gpu_gets_what_the_cpu_gets(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fine_pieces: None
) -> None:
    directory, gpu = tiny_checkpoint(family, tmp_path), pick("cuda")
    rings = loading.Ring
    monkeypatch.setattr(
        loading, "Ring", lambda uploads: rings(uploads, buffers=5, buffer_bytes=999)
    )
    through_ring = tensors_in(loading.load_model(directory, device=gpu, dtype="bfloat16").decoder)
    monkeypatch.setattr(loading, "Ring", lambda uploads: OnHost())
    through_host = tensors_in(loading.load_model(directory, device=gpu, dtype="bfloat16").decoder)
    assert len(through_ring) == len(through_host) > 5
    for one, other in zip(through_ring, through_host, strict=True):
        assert torch.equal(one, other)


class OnHost(Files):
    """Reads into memory of the host, and copies from there."""

    def read(self, stored: Stored, into: Tensor, *, skip: int = 0, later: bool = False) -> None:
        host = torch.empty(into.numel() * into.itemsize, dtype=torch.uint8)
        super().read(stored, host, skip=skip)
        into.view(-1).view(torch.uint8).copy_(host)
