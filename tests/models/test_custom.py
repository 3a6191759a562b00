"""An architecture from outside the package, through every door: its logits, the CLI, LLM, HTTP."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from pagedserve import LLM, SamplingParams
from pagedserve.config import DEMO_MODEL
from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models.architectures.registry import ARCHITECTURES
from pagedserve.models.loading import load_model
from tests.e2e.conftest import LiveServer
from tests.models.paged import PagedRun

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_model"
FILE = EXAMPLE / "tern.py"
PROMPT = "Once upon a time there was a"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("make_checkpoint", EXAMPLE / "make_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tern")
    example().write(directory)
    return directory


@pytest.fixture(autouse=True)
def own_registry() -> Iterator[None]:
    """What a file adds in this process is gone after the test."""
    families, modules = dict(ARCHITECTURES), set(sys.modules)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(families)
    for name in set(sys.modules) - modules:
        if name.startswith("pagedserve_architecture_file:"):
            del sys.modules[name]


def test_the_example_is_as_short_as_promised() -> None:
    assert len(FILE.read_text().splitlines()) <= 40


def test_logits_equal_those_of_a_plain_forward(checkpoint: Path) -> None:
    model = load_model(checkpoint, device=pick("cpu"), architecture_file=str(FILE))
    choice = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 2048, (n,), generator=choice).tolist() for n in (37, 61)]
    run = PagedRun(model, block_size=5)
    got = run.prefill_and_decode(sequences, 24, decode_from=[30, 50])
    for logits, tokens in zip(got, sequences, strict=True):
        want = forward(tokens)
        assert (logits - want).abs().max() / want.abs().max() <= 1e-5


def test_the_command_line_generates_what_the_plain_forward_says(checkpoint: Path) -> None:
    command = ["generate", PROMPT, "--model", str(checkpoint), "--architecture-file", str(FILE)]
    run = subprocess.run(
        [sys.executable, "-m", "pagedserve", *command, "--max-tokens", "12", "--temperature", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.removesuffix("\n") == greedy_text(12)
    assert f"architecture file {FILE} is run" in run.stderr


def test_llm_serves_it_from_its_own_process(checkpoint: Path) -> None:
    with LLM(str(checkpoint), architecture_file=str(FILE)) as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=12))
    assert output.outputs[0].text == greedy_text(12)


def test_a_server_serves_it(checkpoint: Path, tmp_path: Path) -> None:
    live = LiveServer(tmp_path / "log", str(checkpoint), "--architecture-file", str(FILE))
    try:
        live.ready()
        body = {"model": live_model(live), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            live.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["choices"][0]["text"] == greedy_text(12)
        assert f"architecture file {FILE} is run" in live.text()
    finally:
        live.stop()


def test_a_file_that_fails_is_named_with_its_error(checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import no_such_module\n")
    with pytest.raises(StartupError, match=r"bad\.py failed: ModuleNotFoundError"):
        load_model(checkpoint, device=pick("cpu"), architecture_file=str(bad))


def test_a_native_name_is_not_taken_over(checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "again.py"
    bad.write_text(FILE.read_text().replace("TernForCausalLM", "LlamaForCausalLM"))
    with pytest.raises(StartupError, match=r"again\.py failed: .*two specs for LlamaForCausalLM"):
        load_model(checkpoint, device=pick("cpu"), architecture_file=str(bad))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.py", "", r"empty\.py adds no architecture"),
        ("notes.txt", "no code", r"notes\.txt is no Python file"),
        ("absent.py", None, r"absent\.py is no Python file"),
    ],
)
def test_what_is_no_such_file_is_refused(
    name: str, text: str | None, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(StartupError, match=message):
        load_model(checkpoint, device=pick("cpu"), architecture_file=str(tmp_path / name))


def live_model(live: LiveServer) -> str:
    name: str = json.loads(live.get("/v1/models")[1])["data"][0]["id"]
    return name


def greedy_text(count: int) -> str:
    """What the plain forward writes behind the prompt."""
    tokenizer = Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")
    tokens = tokenizer.encode(PROMPT).ids
    written: list[int] = []
    for _ in range(count):
        written.append(int(forward(tokens + written)[-1].argmax()))
    assert 2 not in written, "the sequence would end early"
    text: str = tokenizer.decode(written)
    return text


def forward(tokens: list[int]) -> Tensor:
    """Tern in plain torch, from its description: [T] → [T, vocab]."""
    c, w = example().CONFIG, example().tensors()
    heads, kv_heads, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    at = torch.arange(len(tokens))
    angle = at[:, None] * c["rope_theta"] ** (-torch.arange(0, d, 2) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def normed(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w[f"tern.{name}.weight"], c["rms_norm_eps"])

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = w["tern.embed.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        block = f"blocks.{i}."

        def linear(h: Tensor, name: str, block: str = block) -> Tensor:
            return h @ w[f"tern.{block}{name}.weight"].T

        h = normed(x, block + "norm")
        q = rotated(normed(linear(h, "attn.q").view(-1, heads, d), block + "attn.q_norm"))
        k = rotated(normed(linear(h, "attn.k").view(-1, kv_heads, d), block + "attn.k_norm"))
        v = linear(h, "attn.v").view(-1, kv_heads, d)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        ages = at[:, None] - at
        hidden = ages < 0
        if (i + 1) % c["global_every"]:
            hidden |= ages >= c["sliding_window"]
        scores = torch.einsum("qhd,khd->hqk", q, k) * d**-0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        x = x + linear(mixed, "attn.out") + linear(linear(h, "ffn.up").relu() ** 2, "ffn.down")
    logits = normed(x, "norm") @ w["lm_head.weight"].T
    return c["logit_softcap"] * torch.tanh(logits / c["logit_softcap"])
