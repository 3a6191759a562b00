"""Pickled weights become safetensors that load to the same model; nothing in a pickle is run."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models.convert import convert
from pagedserve.models.loading import load_model
from tests.checkpoints import tiny_checkpoint
from tests.models.paged import PagedRun

Tensors = dict[str, torch.Tensor]


def logits(directory: Path) -> torch.Tensor:
    model = load_model(directory, device=pick("cpu"))
    return PagedRun(model, block_size=4).prefill_and_decode([[5, 9, 7, 200, 31]], 5)[0]


def pickled(directory: Path, num_files: int, **options: Any) -> Tensors:
    """Replace the safetensors of `directory` by pickles; the tensors."""
    tensors: Tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        file.unlink()
    if num_files == 1:
        torch.save(tensors, directory / "pytorch_model.bin", **options)
        return tensors
    weight_map = {}
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin"
        part = dict(list(tensors.items())[number::num_files])
        torch.save(part, directory / name, **options)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


def save(directory: Path, value: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    torch.save(value, directory / name, **options)
    return directory


def held(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("num_files", (1, 3))
@pytest.mark.parametrize("zipped", (True, False))
def test_a_converted_model_gives_the_same_logits(
    num_files: int, zipped: bool, tmp_path: Path
) -> None:
    directory = tiny_checkpoint("llama", tmp_path / "model")
    wanted = logits(directory)
    pickled(directory, num_files, _use_new_zipfile_serialization=zipped)
    before, said = held(directory), []
    with pytest.raises(StartupError, match="pagedserve convert"):
        logits(directory)
    written = convert(directory, say=said.append)
    assert len(said) == num_files and len(written) == num_files + (num_files > 1)
    assert held(directory).items() >= before.items()
    assert held(directory).keys() - before.keys() == {path.name for path in written}
    assert torch.equal(logits(directory), wanted)


def test_another_directory_gets_all_that_serving_needs(tmp_path: Path) -> None:
    directory = tiny_checkpoint("gpt2", tmp_path / "model", tokenizer=True)
    wanted = logits(directory)
    pickled(directory, 2)
    (directory / "optimizer.pt").write_bytes(b"no weights")
    before = held(directory)
    convert(directory, tmp_path / "deep" / "out")
    assert held(directory) == before
    assert held(tmp_path / "deep" / "out").keys() == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert torch.equal(logits(tmp_path / "deep" / "out"), wanted)


def test_tensors_that_share_memory_are_each_written_whole(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = {
        "embed": base,
        "head": base,
        "view": base[2:4],
        "turned": base.t(),
        "strided": base[:, ::2],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(4.0),
        "half": torch.randn(5).to(torch.bfloat16),
        "counts": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "none again": torch.zeros(0, 4),
    }
    convert(save(tmp_path, tensors))
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach()) and found[name].dtype == tensor.dtype


@pytest.mark.parametrize("name", ("pytorch_model.bin", "weights.pt", "consolidated.00.pth"))
def test_tensors_inside_another_object_are_found(name: str, tmp_path: Path) -> None:
    save(tmp_path, {"state_dict": {"x": torch.ones(2)}, "epoch": 3}, name)
    convert(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], torch.ones(2))


class Malice:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


@pytest.mark.parametrize("zipped", (True, False))
def test_a_pickle_that_asks_to_run_something_is_refused(zipped: bool, tmp_path: Path) -> None:
    trap, directory = tmp_path / "sprung", tmp_path / "model"
    directory.mkdir()
    save(directory, {"x": torch.ones(2)}, "a.bin")
    value = {"y": torch.ones(2), "z": Malice(trap)}
    save(directory, value, "b.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(StartupError, match=r"b\.bin asks to run \w+\.mkdir .*was not opened"):
        convert(directory)
    assert not trap.exists()
    assert held(directory).keys() == {"a.bin", "b.bin"}  # not half converted


@pytest.mark.parametrize(
    ("value", "words"),
    (
        ({"x": torch.ones(2), "n": 3}, "n = a int"),
        ([torch.ones(2)], "a list, not tensors by their names"),
        ({}, "a dict, not tensors"),
        ({"model": {"x": torch.ones(2)}, "optimizer": {"x": torch.ones(2)}}, "model = a dict"),
        ({"x": torch.ones(2).to_sparse()}, "x is a tensor of sparse_coo"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "x is a tensor of strided torch.complex64"),
    ),
)
def test_what_is_not_tensors_by_name_is_refused(value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=words):
        convert(save(tmp_path, value))
    assert held(tmp_path).keys() == {"pytorch_model.bin"}


@pytest.mark.parametrize("zipped", (True, False))
def test_a_pickle_cut_off_anywhere_is_named(zipped: bool, tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.randn(1000)}, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "pytorch_model.bin"
    whole = path.read_bytes()
    for length in (0, 1, 2, 5, *random.Random(3).sample(range(len(whole)), 15)):
        path.write_bytes(whole[:length])
        with pytest.raises(StartupError, match=r"pytorch_model\.bin .*get it again"):
            convert(tmp_path)
    assert held(tmp_path).keys() == {"pytorch_model.bin"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(2)})
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(StartupError, match=r"already \(model\.safetensors\).*--out"):
        convert(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        save(tmp_path, {"x": torch.ones(2)}, name)
    with pytest.raises(StartupError, match=r"x is both in .*b\.bin and in an earlier"):
        convert(tmp_path)
    assert held(tmp_path).keys() == {"a.bin", "b.bin"}


def test_a_file_of_the_index_that_is_not_there_is_named(tmp_path: Path) -> None:
    directory = tiny_checkpoint("llama", tmp_path / "model")
    pickled(directory, 2)
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(StartupError, match=r"lacks files of .*: pytorch_model-00002-of-00002\.bin"):
        convert(directory)


@pytest.mark.parametrize(("name", "words"), (("nowhere", "no directory"), ("", "to convert")))
def test_nothing_to_convert_is_said(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(StartupError, match=words):
        convert(tmp_path / name)


def test_a_disk_without_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"x": torch.randn(1000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(StartupError, match="GB free.*--out"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
