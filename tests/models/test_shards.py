"""What a safetensors file says of itself is checked to the last byte, and read without a copy."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pagedserve.errors import StartupError
from pagedserve.models.shards import DTYPES, Files, read_header, stored_tensors

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "b.weight": torch.randn(2, 7, 3).to(torch.bfloat16),
    "c": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.zeros(0, 4),
    "d.counts": torch.arange(9, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_tensor_is_read_as_it_was_written(file: Path) -> None:
    found, files = read_header(file), Files()
    assert found.keys() == TENSORS.keys()
    for name, stored in found.items():
        wanted = TENSORS[name]
        assert stored.shape == tuple(wanted.shape) and DTYPES[stored.dtype] == wanted.dtype
        into = torch.empty_like(wanted).view(-1).view(torch.uint8).fill_(255).view(wanted.dtype)
        files.read(stored, into)
        assert torch.equal(into.view(wanted.shape), wanted)


def test_a_file_cut_off_anywhere_is_named(file: Path) -> None:
    whole = file.read_bytes()
    for length in {0, 7, 8, 9, 100, len(whole) - 1, *random.Random(1).sample(range(900), 20)}:
        file.write_bytes(whole[: min(length, len(whole) - 1)])
        with pytest.raises(StartupError, match=r"model\.safetensors is cut off or damaged"):
            read_header(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(StartupError, match="damaged"):
        read_header(file)


def test_a_damaged_header_never_ends_in_another_error(file: Path) -> None:
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    r = random.Random(2)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[r.randrange(8 + length)] = r.randrange(256)
        file.write_bytes(damaged)
        try:
            read_header(file)
        except StartupError as error:
            assert str(file) in error.message
            refused += 1
    assert refused > 150  # the others changed a name or the metadata


@pytest.mark.parametrize(
    "header",
    (
        b"not json",
        b"[]",
        {"x": 1},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": entry("F32", [2], 0, 4)},
        {"x": entry("F32", [-1, -1], 0, 4)},
        {"x": entry("F32", [1], 4, 8)},
        {"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 0, 4)},
        {"x": entry("F32", [1.0], 0, 4)},  # type: ignore[list-item]
        {"x": entry("F32", [2], 0, 8)},
    ),
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(
    header: Any, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match="damaged"):
        read_header(write(tmp_path / "x.safetensors", header, b"1234"))


def test_a_header_of_absurd_length_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(StartupError, match="header would be"):
        read_header(path)


def test_a_file_that_shrinks_after_it_was_looked_at_is_an_error(file: Path) -> None:
    stored, files = read_header(file)["b.weight"], Files()
    into = torch.empty(42, dtype=torch.bfloat16)
    files.read(stored, into)
    files.check()
    file.write_bytes(file.read_bytes()[: stored.start + 10])
    with pytest.raises(StartupError, match=r"cannot read .*model\.safetensors: it ends at byte"):
        files.read(stored, into)
    with pytest.raises(StartupError, match=r"model\.safetensors was changed while it was read"):
        files.check()
    with pytest.raises(StartupError, match=r"cannot read .*model\.safetensors: it is not the file"):
        Files().read(stored, into)


def sharded(directory: Path, index: Any) -> Path:
    save_file({"x": torch.ones(2), "y": torch.ones(3)}, directory / "one.safetensors")
    save_file({"y": torch.zeros(3), "z": torch.ones(4)}, directory / "two.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_of_two_copies_the_one_counts_that_the_index_names(tmp_path: Path) -> None:
    names = {"x": "one.safetensors", "y": "two.safetensors", "z": "two.safetensors"}
    found = stored_tensors(sharded(tmp_path, {"weight_map": names}))
    assert {name: stored.path.name for name, stored in found.items()} == names


def test_two_copies_that_the_index_does_not_name_are_refused(tmp_path: Path) -> None:
    names = {"x": "one.safetensors", "z": "two.safetensors"}
    with pytest.raises(StartupError, match=r"one\.safetensors and .*two\.safetensors both hold y"):
        stored_tensors(sharded(tmp_path, {"weight_map": names}))


def test_files_under_other_names_are_said_to_be_there(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(StartupError, match=r"only model-00001-of-00002\.safetensors: one file"):
        stored_tensors(tmp_path)


def test_a_tensor_of_the_index_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    names = {"x": "one.safetensors", "w": "two.safetensors"}
    with pytest.raises(StartupError, match=r"lack: w of two\.safetensors"):
        stored_tensors(sharded(tmp_path, {"weight_map": names}))


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    names = {"x": "one.safetensors", "w": "three.safetensors"}
    with pytest.raises(StartupError, match=r"lacks shards .*three\.safetensors"):
        stored_tensors(sharded(tmp_path, {"weight_map": names}))


@pytest.mark.parametrize(
    "index",
    ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"x": 1}},
     {"weight_map": {"x": "../one.safetensors"}}, {"weight_map": {"x": "/etc/passwd"}}),
)  # fmt: skip
def test_an_index_that_is_none_is_refused(index: Any, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"index\.json"):
        stored_tensors(sharded(tmp_path, index))


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pt", "consolidated.00.pth"))
def test_pickles_are_refused_with_the_command_that_converts_them(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "a model"
    directory.mkdir()
    (directory / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(StartupError) as caught:
        stored_tensors(directory)
    assert name in caught.value.message
    assert f"pagedserve convert '{directory}'" in caught.value.message


def test_reading_holds_the_weights_once_in_memory(tmp_path: Path) -> None:
    """The peak of resident memory, file pages included, in a process that does nothing else."""
    megabytes = 192
    parts = {f"t{i}": torch.randn(4 << 20).to(torch.bfloat16) for i in range(megabytes // 8)}
    save_file(parts, tmp_path / "model.safetensors")
    code = f"""
import torch
from pathlib import Path
from pagedserve.models.weights import Checkpoint
from pagedserve.spec import DecoderSpec, Norm

def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) >> 10

spec = DecoderSpec(1, 1, 1, (), Norm(), {{}})
source, kept, before = Checkpoint(Path({str(tmp_path)!r}), spec, print), [], resident("VmRSS")
for name in sorted(source.used):
    same = torch.bfloat16 if int(name[1:]) % 2 else torch.float16
    kept.append(torch.empty(4 << 20, dtype=same))
    source.read(name, kept[-1])
source.finish()
print("grew", resident("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grew = int(run.stdout.split("grew")[1])
    assert megabytes * 0.9 < grew < megabytes * 1.2
