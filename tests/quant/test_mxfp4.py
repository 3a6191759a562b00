"""MXFP4 against transformers' own reading of it, and a whole checkpoint that is stored so."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pagedserve.device import pick
from pagedserve.models.config_json import read_json
from pagedserve.models.loading import load_model
from pagedserve.quant.mxfp4 import E2M1, dequantise
from tests.checkpoints import save, tiny_model
from tests.models.families_moe import EXPERTS
from tests.models.paged import PagedRun
from tests.models.test_parity import truth


def random_mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of [..., columns]; scales within a few powers of two of 1 / 16."""
    *rows, columns = shape
    blocks = torch.randint(0, 256, (*rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(121, 126, (*rows, columns // 32), dtype=torch.uint8)


def test_numbers_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_mxfp4(3, 10, 96)
    ours = torch.empty(3, 10, 96)
    dequantise(blocks, scales, ours)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(ours, theirs.transpose(1, 2))


def test_the_low_half_of_a_byte_comes_first_and_the_scale_is_a_power_of_two() -> None:
    blocks = torch.full((1, 16), 0x00, dtype=torch.uint8)
    blocks[0, 0], blocks[0, 1] = 0x71, 0x9F  # 0.5 and 6; -6 and -0.5
    out = torch.empty(32)
    dequantise(blocks, torch.tensor([129], dtype=torch.uint8), out)
    assert out[:4].tolist() == [2.0, 24.0, -24.0, -2.0] and not out[4:].any()
    assert E2M1[7] == 6.0
    dequantise(blocks, torch.tensor([255], dtype=torch.uint8), out)
    assert out.isnan().all()


def test_a_checkpoint_in_mxfp4_has_the_logits_of_its_numbers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "sliding_window": 9}
    reference = tiny_model("gpt_oss", **EXPERTS, **sizes)
    save(reference, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks, scales = random_mxfp4(experts, outputs, inputs)
        numbers = torch.empty(experts, outputs, inputs)
        dequantise(blocks, scales, numbers)
        reference.get_parameter(name).data.copy_(numbers.transpose(1, 2))
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_json(tmp_path / "config.json")
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path, device=pick("cpu"))
    tokens = torch.randint(3, 250, (40,)).tolist()
    (got,) = PagedRun(model, block_size=5).prefill_and_decode([tokens], 24)
    want = truth(reference, tokens)
    assert (got - want).abs().max() / want.abs().max() <= 1e-5
