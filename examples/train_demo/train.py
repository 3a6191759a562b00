"""Trains the demo model from nothing, inside a wall-clock budget: text, tokenizer, weights, bars.

0 s      corpus, tokenizer    training, on the clock          saved   bars      --seconds
|--------------------------|--------------------------------|-------|---------|
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers
import torch
import transformers
from bars import Case, draw_cases, measure
from build_tokenizer import MAX_POSITIONS, save_tokenizer, train_tokenizer
from chat_format import END_OF_TEXT, TURN_END
from corpus import SHARES, write_document
from model_card import bars_table, model_card
from packing import ANSWER_BIT, Encoder, TokenStream, pack, write_corpus
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

HEAD_DIM = 32
# Row lengths and how often a step uses each: short rows put more documents at position 0, long
# ones train the far positions.
ROW_LENGTHS = {256: 0.25, 512: 0.25, 1024: 0.3, 2048: 0.2}
PROMPT_WEIGHT = 0.15
WARMUP, DECAY_FROM = 0.02, 0.55
LOG_EVERY_STEPS = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the wall clock goes, in seconds since the start."""

    started: float
    corpus_seconds: float
    train_until: float
    end: float

    @staticmethod
    def of(seconds: float) -> Plan:
        now = time.monotonic()
        reserve = min(70.0, 0.25 * seconds)
        return Plan(now, min(60.0, 0.2 * seconds), now + seconds - reserve, now + seconds)

    def elapsed(self) -> float:
        return time.monotonic() - self.started


@dataclass(slots=True)
class RowSource:
    """The token stream on the device, and the random rows cut from it."""

    tokens: torch.Tensor  # [num_tokens] int32, answer bits included
    starts: torch.Tensor  # [num_documents] int64, sorted
    generator: torch.Generator

    @staticmethod
    def of(stream: TokenStream, device: torch.device, seed: int) -> RowSource:
        tokens = torch.from_numpy(stream.tokens.astype(np.int32)).to(device)
        starts = torch.from_numpy(stream.starts).to(device)
        return RowSource(tokens, starts, torch.Generator(device).manual_seed(seed))

    def draw(self, num_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs and targets, [num_rows, length] int64, and the weight of each target, fp32."""
        device = self.tokens.device
        limit = len(self.tokens) - length - 1
        picks = torch.randint(
            len(self.starts), (num_rows,), device=device, generator=self.generator
        )
        begin = self.starts[picks].clamp(max=limit)
        rows = self.tokens[begin[:, None] + torch.arange(length + 1, device=device)].long()
        ids = rows & (ANSWER_BIT - 1)
        weights = torch.where(rows[:, 1:] >= ANSWER_BIT, 1.0, PROMPT_WEIGHT)
        return ids[:, :-1], ids[:, 1:], weights


def main() -> None:
    args = parse_args()
    plan = Plan.of(args.seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(args.seed)
    if not on_gpu:
        torch.set_num_threads(args.threads)

    tokenizer = train_tokenizer(args.seed, 20_000 if on_gpu else 4_000)
    save_tokenizer(tokenizer, args.out)
    say(plan, f"tokenizer: {tokenizer.get_vocab_size()} tokens")
    stream = write_corpus(
        tokenizer,
        args.seed,
        max_tokens=args.tokens or (120_000_000 if on_gpu else 2_000_000),
        max_seconds=plan.corpus_seconds,
        num_workers=(os.cpu_count() or 1) if on_gpu else 1,
    )
    say(plan, f"corpus: {len(stream.tokens):,} tokens, {len(stream.starts):,} documents")

    model = LlamaForCausalLM(model_config(args, tokenizer)).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    say(plan, f"model: {num_parameters:,} parameters on {device}")
    rows = RowSource.of(stream, device, args.seed)
    log = train(
        model,
        rows,
        plan,
        batch_tokens=args.batch_tokens or (65_536 if on_gpu else 4_096),
        peak_lr=args.lr,
    )

    log["held_out_loss"] = held_out_losses(model, Encoder(tokenizer), args.seed)
    save_model(model, tokenizer, args.out)
    finish(args, plan, log, {})
    say(plan, "saved")
    cases = draw_cases(args.cases or (400 if on_gpu else 20))
    finish(args, plan, log, measure_bars(args.out, cases, device, deadline=plan.end))
    print_summary(log)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--seconds", type=float, default=400, help="wall clock for everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--intermediate", type=int, default=0, help="default: 2.75 x hidden")
    parser.add_argument("--kv-heads", type=int, default=0, help="default: a quarter of the heads")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--tokens", type=int, default=0, help="corpus size; default by device")
    parser.add_argument("--batch-tokens", type=int, default=0, help="default by device")
    parser.add_argument("--cases", type=int, default=0, help="cases a bar; default by device")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads without a GPU")
    return parser.parse_args()


def say(plan: Plan, text: str) -> None:
    print(f"[{plan.elapsed():6.1f} s] {text}", flush=True)


def model_config(args: argparse.Namespace, tokenizer: tokenizers.Tokenizer) -> LlamaConfig:
    num_heads = args.hidden // HEAD_DIM
    turn_end, end_of_text = (tokenizer.token_to_id(t) for t in (TURN_END, END_OF_TEXT))
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=num_heads,
        num_key_value_heads=args.kv_heads or max(1, num_heads // 4),
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[turn_end, end_of_text],
        pad_token_id=end_of_text,
        attn_implementation="sdpa",
    )


def train(
    model: LlamaForCausalLM,
    rows: RowSource,
    plan: Plan,
    *,
    batch_tokens: int,
    peak_lr: float,
) -> dict[str, Any]:
    """Steps until the clock says stop; returns the numbers worth keeping."""
    optimizer = make_optimizer(model, peak_lr)
    lengths = random.Random(0).choices(list(ROW_LENGTHS), list(ROW_LENGTHS.values()), k=10_007)
    began, num_tokens, step = time.monotonic(), 0, 0
    losses: list[tuple[int, float]] = []
    model.train()
    while (now := time.monotonic()) < plan.train_until:
        progress = (now - began) / (plan.train_until - began)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * lr_factor(progress)
        length = min(lengths[step % len(lengths)], batch_tokens)
        batch = rows.draw(max(1, batch_tokens // length), length)
        loss = train_step(model, optimizer, *batch)
        num_tokens += batch[0].numel()
        step += 1
        if step % LOG_EVERY_STEPS == 0 or step == 1:
            losses.append((step, round(loss.item(), 4)))
            if step % (5 * LOG_EVERY_STEPS) == 0 or step == 1:
                rate = num_tokens / (time.monotonic() - began)
                say(plan, f"step {step}: loss {losses[-1][1]:.3f}, {rate:,.0f} tokens/s")
    losses.append((step, round(loss.item(), 4)))
    seconds = round(time.monotonic() - began, 1)
    kept = losses[:: max(1, len(losses) // 40)] + losses[-1:]
    say(plan, f"trained: {step} steps, loss {losses[0][1]:.3f} -> {losses[-1][1]:.3f}")
    return {"steps": step, "tokens": num_tokens, "train_seconds": seconds, "losses": kept}


def make_optimizer(model: LlamaForCausalLM, peak_lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=fused)


def lr_factor(progress: float) -> float:
    """Warm up, hold, then fall along a half cosine to 2 % of the peak at the end of the clock."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    if progress < DECAY_FROM:
        return 1.0
    fall = min(1.0, (progress - DECAY_FROM) / (1 - DECAY_FROM))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall))


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """One update; returns the weighted loss, still on the device."""
    with mixed_precision(ids.device):
        # Without a mask transformers asks for causal attention, which has a fused kernel.
        logits = model(input_ids=ids, use_cache=False).logits
    loss = weighted_loss(logits, targets, weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], 1.0
    )
    optimizer.step()
    return loss.detach()


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def weighted_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy of the targets, each counted by its weight."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def held_out_losses(model: LlamaForCausalLM, encoder: Encoder, seed: int) -> dict[str, float]:
    """The loss on answer tokens of fresh documents, kind by kind."""
    model.eval()
    rng, device = random.Random(-seed), next(model.parameters()).device
    losses = {}
    for kind in SHARES:
        written = [write_document(rng, kind) for _ in range(48)]
        stream = pack(encoder.encode(written))
        row = torch.from_numpy(stream.tokens[: MAX_POSITIONS + 1].astype(np.int64))[None].to(device)
        ids, is_answer = row & (ANSWER_BIT - 1), (row[:, 1:] >= ANSWER_BIT).float()
        with mixed_precision(device):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses[kind] = round(weighted_loss(logits, ids[:, 1:], is_answer).item(), 4)
    return losses


def save_model(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """The Hugging Face files, weights in bf16."""
    ids = [tokenizer.token_to_id(token) for token in (TURN_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        eos_token_id=ids, pad_token_id=ids[1], do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(directory)


def finish(args: argparse.Namespace, plan: Plan, log: dict[str, Any], bars: dict[str, Any]) -> None:
    """Writes the model card and the log, with what is known so far."""
    config = LlamaConfig.from_pretrained(args.out)
    num_parameters = (args.out / "model.safetensors").stat().st_size // 2
    card = model_card(config, args.seed, num_parameters, bars)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    log |= {
        "bars": bars,
        "seed": args.seed,
        "total_seconds": round(plan.elapsed(), 1),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure_bars(
    directory: Path, cases: Sequence[Case], device: torch.device, *, deadline: float
) -> dict[str, Any]:
    """The bars of the saved model; batches that the deadline cuts off are not counted."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device).eval()
    done: list[tuple[Case, str]] = []
    for batch in interleaved_batches(cases, 200):
        if time.monotonic() > deadline:
            break
        inputs = tokenizer([case.prompt for case in batch], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=max(case.max_tokens for case in batch),
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        done += [
            (c, t.split(c.stop)[0] if c.stop else t) for c, t in zip(batch, texts, strict=True)
        ]
    if not done:
        return {}
    show_failures(done)
    return measure([case for case, _ in done], [text for _, text in done])


def interleaved_batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Batches of one bar each, the bars taking turns, so that a deadline starves none."""
    by_bar: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        by_bar.setdefault((case.bar, case.max_tokens), []).append(case)
    for begin in range(0, max(map(len, by_bar.values())), size):
        for group in by_bar.values():
            if batch := group[begin : begin + size]:
                yield batch


def show_failures(done: Sequence[tuple[Case, str]]) -> None:
    """A few completions that missed, for whoever tunes the corpus."""
    for name in dict.fromkeys(case.bar for case, _ in done):
        missed = [(c, t) for c, t in done if c.bar == name and not c.is_exact(t)]
        for case, text in missed[:3]:
            print(f"missed {name}: {case.prompt[-160:]!r} -> {text[:200]!r}")


def print_summary(log: dict[str, Any]) -> None:
    print("\nheld-out loss on answers")
    for kind, loss in log["held_out_loss"].items():
        print(f"  {kind:12s} {loss:.4f}")
    print(f"\n{bars_table(log['bars'])}\n")
    print(
        json.dumps({key: log[key] for key in ("steps", "tokens", "train_seconds", "total_seconds")})
    )


if __name__ == "__main__":
    main()
