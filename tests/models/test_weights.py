"""A checkpoint is accounted for to the last tensor, and what is wrong with it is said by name."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models import config_json, weights
from pagedserve.models.architectures import spec_of
from pagedserve.models.loading import LoadedModel, load_model
from pagedserve.models.weights import Checkpoint, Dummy
from tests.checkpoints import tiny_checkpoint
from tests.models.paged import PagedRun

Tensors = dict[str, torch.Tensor]


def load(directory: Path, **options: Any) -> LoadedModel:
    return load_model(directory, device=pick("cpu"), **options)


def logits(model: LoadedModel) -> torch.Tensor:
    return PagedRun(model, block_size=4).prefill_and_decode([[5, 9, 7, 200, 31]], 5)[0]


def rewrite(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def tensors_of(directory: Path) -> Tensors:
    """Copies, so that their file can be written anew."""
    return {name: t.clone() for name, t in load_file(directory / "model.safetensors").items()}


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def checkpoint(directory: Path) -> Checkpoint:
    spec = spec_of(config_json.read(directory))
    return Checkpoint(directory, spec, lambda phase: None)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_checkpoint("llama", tmp_path / "llama")


def test_shards_are_read_like_a_single_file(llama: Path, tmp_path: Path) -> None:
    sharded = tiny_checkpoint("llama", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(sharded)), logits(load(llama)))


def test_a_missing_tensor_is_named(llama: Path) -> None:
    tensors = tensors_of(llama)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    rewrite(llama, tensors)
    with pytest.raises(StartupError, match=r"lacks 1 .*layers\.1\.self_attn\.k_proj\.weight"):
        load(llama)


def test_a_missing_bias_that_the_family_demands_is_named(tmp_path: Path) -> None:
    directory = tiny_checkpoint("qwen2", tmp_path)
    tensors = tensors_of(directory)
    del tensors["model.layers.0.self_attn.v_proj.bias"]
    rewrite(directory, tensors)
    with pytest.raises(StartupError, match=r"layers\.0\.self_attn\.v_proj\.bias"):
        load(directory)


def test_a_tensor_left_over_is_named(llama: Path) -> None:
    rewrite(llama, {**tensors_of(llama), "model.layers.0.self_attn.sinks": torch.zeros(4)})
    with pytest.raises(StartupError, match=r"does not use: model\.layers\.0\.self_attn\.sinks"):
        load(llama)


def test_a_bias_that_only_the_checkpoint_knows_of_is_used(llama: Path) -> None:
    plain = logits(load(llama))
    bias = {"model.layers.0.mlp.down_proj.bias": torch.full((64,), 0.5)}
    rewrite(llama, {**tensors_of(llama), **bias})
    assert not torch.allclose(logits(load(llama)), plain)


def test_more_names_than_anyone_reads_are_counted(llama: Path) -> None:
    tensors = tensors_of(llama)
    rewrite(llama, {n: t for n, t in tensors.items() if ".layers.2." not in n})
    with pytest.raises(StartupError, match=r"lacks 9 tensors .* and 1 more"):
        load(llama)


def test_buffers_that_are_no_parameters_may_be_there(llama: Path, tmp_path: Path) -> None:
    gpt2 = tiny_checkpoint("gpt2", tmp_path / "gpt2")
    wanted = logits(load(llama)), logits(load(gpt2))
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    rewrite(llama, {**tensors_of(llama), **frequencies})
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    rewrite(gpt2, {**tensors_of(gpt2), **masks})
    assert torch.equal(logits(load(llama)), wanted[0])
    assert torch.equal(logits(load(gpt2)), wanted[1])


def test_a_checkpoint_saved_without_its_head_is_read(tmp_path: Path) -> None:
    directory = tiny_checkpoint("gpt2", tmp_path)
    wanted = logits(load(directory))
    bare = {n.removeprefix("transformer."): t for n, t in tensors_of(directory).items()}
    assert "wte.weight" in bare
    rewrite(directory, bare)
    assert torch.equal(logits(load(directory)), wanted)


def test_a_tied_head_may_be_stored_again_and_an_other_one_is_used(tmp_path: Path) -> None:
    directory = tiny_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    wanted, tensors = load(directory), tensors_of(directory)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(directory, {**tensors, "lm_head.weight": embedding.clone()})
    again = load(directory)
    assert torch.equal(logits(again), logits(wanted))
    assert again.weight_bytes == wanted.weight_bytes
    rewrite(directory, {**tensors, "lm_head.weight": embedding.clone() * 2})
    torch.testing.assert_close(logits(load(directory)), 2 * logits(wanted))


def test_a_head_that_is_neither_tied_nor_there_is_missing(llama: Path) -> None:
    tensors = tensors_of(llama)
    del tensors["lm_head.weight"]
    rewrite(llama, tensors)
    with pytest.raises(StartupError, match=r"lacks 1 .*lm_head\.weight"):
        load(llama)


def test_a_wrong_shape_is_said_with_both_shapes(llama: Path) -> None:
    edit_config(llama, intermediate_size=100)
    with pytest.raises(StartupError, match=r"gate_proj.weight .*\(96, 64\).*\(100, 64\)"):
        load(llama)


def test_a_file_that_is_cut_off_is_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(StartupError, match=r"model\.safetensors is cut off or damaged"):
        load(llama)


def test_an_empty_file_is_named(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"")
    with pytest.raises(StartupError, match=r"model\.safetensors is cut off or damaged \(0 bytes\)"):
        load(llama)


def test_a_directory_without_weights_says_what_could_be_done(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(StartupError, match="no weights.*--load-format dummy"):
        load(llama)


def test_bytes_are_told_up_to_the_last(llama: Path) -> None:
    counts: list[tuple[int, int]] = []
    load(llama, on_bytes=lambda done, total: counts.append((done, total)))
    (total,) = {total for _, total in counts}
    assert counts == sorted(counts) and counts[-1][0] == total
    assert 10 < len(counts) <= 100
    assert total == (llama / "model.safetensors").stat().st_size - header_bytes(llama)


def header_bytes(directory: Path) -> int:
    """What stands before the tensors of its one file."""
    with (directory / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_progress_is_told_by_tenths(llama: Path) -> None:
    told: list[str] = []
    load(llama, on_progress=told.append)
    assert told[0] == "loading weights"
    assert told[-1] == "loading weights: 100 %"
    assert len(told) <= 11


@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3", "gpt2"))
def test_dummy_weights_need_only_a_config_and_follow_the_seed(family: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(family, tmp_path)
    real = load(directory)
    (directory / "model.safetensors").unlink()
    one, two, other = (load(directory, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(other))
    assert logits(one).isfinite().all()
    assert one.decoder.embedding.table.abs().max() <= 1e-3
    assert one.weight_bytes == real.weight_bytes


def test_weights_are_cast_to_the_wanted_dtype(llama: Path) -> None:
    full, half = load(llama), load(llama, dtype="bfloat16")
    assert half.dtype == half.decoder.dtype == torch.bfloat16
    got = PagedRun(half, 4, kv_dtype=torch.bfloat16).prefill_and_decode([[5, 9, 7, 200, 31]], 5)[0]
    assert got.dtype == torch.float32
    assert (got - logits(full)).abs().max() / logits(full).abs().max() < 0.05


@pytest.mark.parametrize("staging", (1, 1000, 1 << 20))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_packed_tensor_is_read_in_parts_by_rows(
    staging: int, dtype: torch.dtype, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "STAGING_BYTES", staging)
    source, name = checkpoint(llama), "model.layers.0.mlp.up_proj.weight"
    stored = tensors_of(llama)[name].to(dtype)  # [96, 64]
    for turned, transposed in ((stored, False), (stored.t(), True)):
        order = torch.randperm(len(turned))
        parts = (order[:17], order[17:], torch.arange(7, 40), torch.tensor([3, 3, 63]), order[:0])
        for rows in parts:
            into = torch.full((len(rows), turned.shape[1]), torch.nan, dtype=dtype)
            source.read(name, into, rows=rows, transposed=transposed)
            assert torch.equal(into, turned[rows])
        strided = torch.full((*turned.shape, 2), torch.nan, dtype=dtype)[..., 1]
        source.read(name, strided, transposed=transposed)
        assert torch.equal(strided, turned)
    assert source.has(name) and source.shape(name) == (96, 64)


def test_stacked_matrices_are_turned_each_and_picked_by_the_first_dimension(llama: Path) -> None:
    stack = torch.randn(5, 6, 7)
    rewrite(llama, {**tensors_of(llama), "experts": stack})
    source, rows = checkpoint(llama), torch.tensor([4, 0, 1])
    into = torch.full((5, 7, 6), torch.nan)
    source.read("experts", into, transposed=True)
    assert torch.equal(into, stack.mT)
    source.read("experts", into[:3].fill_(torch.nan), transposed=True, rows=rows)
    assert torch.equal(into[:3], stack.mT[rows])


def test_a_part_counts_as_read_and_a_row_that_is_not_there_is_an_error(llama: Path) -> None:
    source, name = checkpoint(llama), "model.layers.0.mlp.up_proj.weight"
    source.read(name, torch.empty(2, 64), rows=torch.tensor([0, 95]))
    with pytest.raises(StartupError, match=r"does not use") as caught:
        source.finish()
    assert name not in caught.value.message
    with pytest.raises(StartupError, match=r"\(96, 64\).*asks for \(2, 64\) in rows up to 96"):
        source.read(name, torch.empty(2, 64), rows=torch.tensor([0, 96]))


def test_the_shape_of_what_is_not_there_is_none(llama: Path) -> None:
    source = checkpoint(llama)
    assert source.shape("model.layers.0.self_attn.qkv.weight") is None
    assert source.shape("model.norm.weight") == (64,)
    assert Dummy(0, torch.device("cpu")).shape("model.norm.weight") is None


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("wanted", ("float32", "bfloat16"))
def test_weights_of_every_width_are_cast(dtype: torch.dtype, wanted: str, llama: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(llama).items()}
    rewrite(llama, tensors)
    table = load(llama, dtype=wanted).decoder.embedding.table
    assert torch.equal(table, tensors["model.embed_tokens.weight"].to(getattr(torch, wanted)))


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2))
def test_fp8_without_a_scheme_is_refused_by_name(dtype: torch.dtype, llama: Path) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    rewrite(llama, {**tensors_of(llama), name: torch.zeros(96, 64).to(dtype)})
    with pytest.raises(StartupError, match=rf"{name} in .* is F8_E.M.: fp8 .* scheme"):
        load(llama)


@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.int64, torch.bool))
def test_weights_that_are_no_floating_point_numbers_are_refused(
    dtype: torch.dtype, llama: Path
) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    rewrite(llama, {**tensors_of(llama), name: torch.ones(96, 64).to(dtype)})
    with pytest.raises(StartupError, match=rf"{name} in .* is [IUB]\w+: not supported; .*F64, F32"):
        load(llama)


def test_packed_integers_are_read_as_they_are(llama: Path) -> None:
    blocks = torch.randint(0, 256, (6, 5, 16), dtype=torch.uint8)
    rewrite(llama, {**tensors_of(llama), "blocks": blocks})
    source, into = checkpoint(llama), torch.zeros(6, 5, 16, dtype=torch.uint8)
    source.read("blocks", into)
    assert torch.equal(into, blocks)
    Dummy(3, torch.device("cpu")).read("blocks", into)
    assert not torch.equal(into, blocks)


def test_what_is_ignored_is_said_unless_everybody_knows_it(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = spec_of(config_json.read(llama))
    spec = dataclasses.replace(plain, ignored=(r"inv_freq", r"^mtp\."))
    caplog.set_level(logging.INFO, "pagedserve")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    rewrite(llama, {**tensors_of(llama), **frequencies})
    Checkpoint(llama, spec, lambda phase: None)
    assert not caplog.records
    rewrite(llama, {**tensors_of(llama), **frequencies, "mtp.0.weight": torch.zeros(3)})
    source = Checkpoint(llama, spec, lambda phase: None)
    (record,) = caplog.records
    assert "2 tensors are not used" in record.message and "mtp.0.weight" in record.message
    assert not source.has("mtp.0.weight") and source.shape("mtp.0.weight") is None
