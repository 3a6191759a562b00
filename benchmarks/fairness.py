"""One API key floods the server: what does another key's client wait for its first token?

    python benchmarks/fairness.py                  # measures, writes fairness.json beside this
    python benchmarks/fairness.py --plot           # draws docs/fairness.svg from it (matplotlib)

The demo model, through HTTP, in four settings, each on a server of its own:

idle        the quiet key alone
flood       beside it the flood: `--crowd` streams of another key at any time, each long
one queue   the same, but both have one key: what it would be without fair shares
no room     the flood with a cache too small for it, so that sequences are preempted

The quiet key asks `--requests` times, at random moments, one at a time. One JSON line a setting:
time to first token of the quiet key, how many times that of `idle`, and the flood's tokens/s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plot import plain_ticks, svg

from pagedserve.commands.bench import machine
from pagedserve.commands.bench.client import Job, ask_all
from pagedserve.commands.bench.clients import Target
from pagedserve.commands.bench.figures import percentile, summary
from pagedserve.commands.bench.startup import free_port, stop, watch
from pagedserve.errors import PagedServeError

HERE = Path(__file__).parent
QUIET, FLOOD = "quiet-key", "flood-key"
START_SECONDS = 120.0
WARM_UP = 5
ROUNDS = 40  # of the flood's streams: more than the measurement takes
LEAD_SECONDS = 3.0  # until the flood is everywhere
OPENING = "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Setting:
    """`flags` of the server; `shared`: the flood has the quiet client's key.

    `part`: of the requests, where each waits for seconds.
    """

    flooded: bool = True
    shared: bool = False
    part: float = 1.0
    flags: tuple[str, ...] = ()


SETTINGS = {
    "idle": Setting(flooded=False),
    "flood": Setting(),
    "one queue": Setting(shared=True, part=0.2),
    "no room": Setting(flags=("--num-gpu-blocks-override", "300")),
}
COLOURS = {"idle": "#666666", "flood": "#1b5fc2", "one queue": "#c26a1b", "no room": "#1b9e77"}


def main() -> int:
    args = parse_args()
    if args.plot:
        plot(json.loads(args.data.read_text()), args.out)
        return 0
    results: list[dict[str, Any]] = []
    try:
        for name in args.settings or SETTINGS:
            found = measure(SETTINGS[name], args)
            idle = results[0]["ttft_ms"] if results and results[0]["setting"] == "idle" else None
            times = idle and round(found["ttft_ms"]["p50"] / idle["p50"], 2)
            results.append({"benchmark": "fairness", "setting": name, "times_idle": times, **found})
            shown = {key: value for key, value in results[-1].items() if key != "samples_ms"}
            args.data.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps({**shown, **machine.versions()}), flush=True)
    except PagedServeError as error:
        print(f"fairness.py: {error.message}", file=sys.stderr)
        return 1
    return 1 if any(each["failed"] for each in results) else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; none: all")
    parser.add_argument("--requests", type=int, default=100, help="of the quiet key")
    parser.add_argument("--crowd", type=int, default=128, help="streams of the flood at any time")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of each prompt, about")
    parser.add_argument("--serve", default="", metavar="FLAGS", help="more flags of the server")
    parser.add_argument("--data", type=Path, default=HERE / "fairness.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "fairness.svg")
    parser.add_argument("--plot", action="store_true", help="draw what was measured before")
    args = parser.parse_args()
    if unknown := set(args.settings) - set(SETTINGS):
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    return args


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """The quiet key's figures in one setting."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as log:
        keys, port = Path(place) / "keys", free_port()
        keys.write_text(f"quiet:{QUIET} scope=admin\nflood:{FLOOD}\n")
        flags = ["--api-key-file", str(keys), "--port", str(port), *setting.flags]
        process = subprocess.Popen(
            [sys.executable, "-m", "pagedserve", "serve", *flags, *args.serve.split()],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            start = watch(process, url, log, START_SECONDS, time.perf_counter())
            if start.error:
                raise PagedServeError(start.error)
            return ask_beside(url, setting, args)
        finally:
            stop(process)


def ask_beside(url: str, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Ask as the quiet key, while the flood comes where there is one."""
    quiet = Target(url, api_key=QUIET, timeout=120)
    asyncio.run(ask_all(quiet.plan(jobs(WARM_UP, args, seed=1), 1), time.monotonic()))
    flood = multiprocessing.Process(target=flood_with, args=(url, setting.shared, args))
    before, count = written(url), max(1, round(args.requests * setting.part))
    began = time.monotonic()
    if setting.flooded:
        flood.start()
        time.sleep(LEAD_SECONDS)
    outcomes = asyncio.run(ask_all(quiet.plan(jobs(count, args, seed=2), 1), time.monotonic()))
    tokens, seconds = written(url) - before, time.monotonic() - began
    if setting.flooded:
        flood.kill()
        flood.join()
    found = summary(outcomes)
    samples = sorted(1e3 * (each.at[0] - each.began) for each in outcomes if not each.error)
    return {
        "ttft_ms": found["ttft_ms"],
        "failed": found["failed"],
        "first_error": next((each.error for each in outcomes if each.error), None),
        "requests": count,
        "crowd": args.crowd if setting.flooded else 0,
        "tokens_per_s_in_all": round(tokens / seconds, 1),
        "samples_ms": [round(each, 2) for each in samples],
    }


def jobs(count: int, args: argparse.Namespace, *, seed: int, tokens: int = 8) -> list[Job]:
    """Streams at random moments, of prompts that begin differently."""
    r = random.Random(seed)
    made, now = [], 0.0
    for _ in range(count):
        words = " ".join(
            r.choice(["fox", "river", "tree", "bird", "boat"]) for _ in range(args.prompt)
        )
        body = {"prompt": words + OPENING, "max_tokens": tokens, "ignore_eos": True}
        body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        now += r.expovariate(8)
        made.append(Job(now, json.dumps(body).encode(), tokens))
    return made


def flood_with(url: str, shared: bool, args: argparse.Namespace) -> None:
    """More long streams than the measurement takes; a process of its own, which is ended."""
    target = Target(url, api_key=QUIET if shared else FLOOD, timeout=600)
    crowd = jobs(ROUNDS * args.crowd, args, seed=100, tokens=200)
    asked = [Job(0.0, job.body, job.num_tokens) for job in crowd]
    asyncio.run(ask_all(target.plan(asked, args.crowd), time.monotonic()))


def written(url: str) -> float:
    """Tokens of ended sequences, of all keys."""
    asked = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {QUIET}"})
    with urllib.request.urlopen(asked, timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("pagedserve:generation_tokens_total")
    )


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """Time to first token of the quiet key: the share of its requests that waited no longer."""
    with svg(out, 1, (7.2, 4.2)) as (_, (panel,)):
        for each in results:
            samples = each["samples_ms"]
            shares = [(at + 1) / len(samples) for at in range(len(samples))]
            half, most = percentile(samples, 50), percentile(samples, 99)
            label = f"{each['setting']}: half within {half:.0f} ms, 99 % within {most:.0f}"
            panel.step(samples, shares, where="post", label=label, color=COLOURS[each["setting"]])
        panel.set(
            xscale="log",
            xlabel="ms to the first token of the quiet key",
            ylabel="share of its requests",
            title=f"A flood of {max(each['crowd'] for each in results)} streams of another key",
        )
        plain_ticks(panel.xaxis)
        panel.grid(True, linewidth=0.3)
        panel.legend(loc="lower right", fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
