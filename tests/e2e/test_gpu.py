"""The same engine and server on a CUDA GPU: same tokens as on the CPU, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from pagedserve import LLM, SamplingParams
from tests.e2e.conftest import NEW_TOKENS, LiveServer, prompts

pytestmark = pytest.mark.gpu


def greedy(**options: object) -> list[list[int]]:
    """What the demo model writes greedily behind each prompt."""
    with LLM(dtype="float32", **options) as llm:
        asked = [{"prompt_token_ids": ids} for ids in prompts()]
        outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def on_cpu() -> list[list[int]]:
    return greedy(device="cpu")


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_tokens_equal_the_cpu_s(on_cpu: list[list[int]], overlap: bool) -> None:
    assert greedy(device="cuda", async_scheduling=overlap, max_num_batched_tokens=96) == on_cpu


def test_greedy_tokens_equal_the_cpu_s_through_preemption(on_cpu: list[list[int]]) -> None:
    small = {"num_gpu_blocks_override": 90, "block_size": 4}
    assert greedy(device="cuda", **small) == on_cpu


def test_greedy_tokens_equal_transformers(reference: list[list[int]]) -> None:
    assert greedy(device="cuda") == reference


def test_sampled_tokens_equal_the_cpu_s() -> None:
    runs = []
    for device in ("cpu", "cuda"):
        params = [
            SamplingParams(seed=n, max_tokens=12, temperature=0.8, top_p=0.95, top_k=50)
            for n in range(16)
        ]
        with LLM(dtype="float32", device=device) as llm:
            asked = [{"prompt_token_ids": ids} for ids in prompts()[:16]]
            outputs = llm.generate(asked, params)
        runs.append([output.outputs[0].token_ids for output in outputs])
    assert runs[0] == runs[1]


def test_the_server_answers_in_the_checkpoint_s_dtype(tmp_path: Path) -> None:
    live = LiveServer(tmp_path / "log", "--device", "cuda").ready()
    try:
        assert "bfloat16" in live.text()
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as api:
            answer = api.chat.completions.create(
                model="pagedserve-demo",
                messages=[{"role": "user", "content": "What is 27 + 45?"}],
                temperature=0,
            )
        assert "72" in answer.choices[0].message.content
        assert live.interrupt() == 0
    finally:
        live.stop()


def test_eight_billion_random_weights_fit_by_plan_and_answer(tmp_path: Path) -> None:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "hidden_act": "silu",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "eos_token_id": 128001,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True) as llm:
        ready = llm._client.ready
        assert ready is not None and ready.dtype == "bfloat16"
        print(f"{ready.num_blocks} blocks, ready after {ready.seconds:.1f} s")
        assert ready.num_blocks * ready.block_size > ready.max_model_len
        asked = [{"prompt_token_ids": list(range(10, 10 + 300 * n))} for n in range(1, 17)]
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs = llm.generate(asked, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 16
