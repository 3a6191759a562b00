"""`bench serve` through the command line: against a server, and against what is none or breaks."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedserve.cli import main
from pagedserve.commands.bench import machine
from pagedserve.commands.bench.client import write_all
from tests.api.serving import Server
from tests.commands.bench.misbehaving import (
    DONE,
    HEAD,
    Counted,
    Misbehaving,
    Write,
    chunk,
    piece,
    usage,
    whole,
)
from tests.text.building import byte_level, write_checkpoint

ONE = ["--client-processes", "1"]  # starting several takes longer than these tests
SHORT = [*ONE, "--num-prompts", "6", "--random-input-len", "9", "--random-output-len", "4"]
PLAIN = ["--random-vocab-size", "90"]  # ids whose text is one character


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is not asked: that takes seconds."""
    monkeypatch.setattr(machine, "gpu_name", lambda: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level())


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(log, model=str(checkpoint), served_model_name="toy") as started:
        yield started.until_ready()


Bench = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run the command with --json: its status and its line."""

    def run(url: str, *flags: str) -> tuple[int, dict[str, Any]]:
        status = main(["bench", "serve", "--base-url", url, "--json", *flags])
        (line,) = capsys.readouterr().out.splitlines()
        return status, json.loads(line)

    return run


def test_a_line_says_what_was_asked_and_what_came(server: Server, bench: Bench) -> None:
    status, line = bench(server.url, *SHORT, *PLAIN, "--num-warmups", "2", "--seed", "5")
    assert status == 0
    assert (line["benchmark"], line["model"], line["seed"]) == ("serve", "toy", 5)
    assert (line["completed"], line["failed"], line["errors"]) == (6, 0, {})
    assert (line["input_tokens"], line["output_tokens"]) == (6 * 9, 6 * 4)
    assert line["output_tokens_per_s"] == pytest.approx(24 / line["duration_s"], rel=0.01)
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert 0 <= line[name]["p50"] <= line[name]["p90"] <= line[name]["p99"]
    assert line["e2e_ms"]["mean"] >= line["ttft_ms"]["mean"] > 0
    assert line["server"] == line["pagedserve"] and line["python"] and "gpu" in line


def test_the_table_has_the_metrics_that_were_asked_for(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "25,99.9"]
    url = f"{server.url}/v1/"  # also with the path of the API
    assert main(["bench", "serve", "--base-url", url, *SHORT, *PLAIN, *flags]) == 0
    shown = capsys.readouterr().out
    assert "tpot_ms" not in shown and "e2e_ms" not in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("ttft_ms"))
    assert [cell.split()[0] for cell in row[25:].split(" · ")] == ["mean", "p25", "p99.9"]


def test_results_are_saved_with_every_request(server: Server, bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    status, line = bench(
        server.url, *SHORT, *PLAIN, "--save-result", "--result-filename", str(file)
    )
    saved = json.loads(file.read_text())
    requests = saved.pop("requests")
    assert status == 0 and saved == line and len(requests) == 6
    assert all(r["output_tokens"] == 4 and 0 < r["ttft_s"] <= r["e2e_s"] for r in requests)
    bad = main(["bench", "serve", "--base-url", server.url, *SHORT, *PLAIN,
                "--result-filename", "/nowhere/x.json"])  # fmt: skip
    assert bad == 1


def test_questions_of_a_file_are_sent_as_text(
    server: Server, bench: Bench, tmp_path: Path, checkpoint: Path
) -> None:
    file = tmp_path / "conversations.json"
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello hello"}]
    file.write_text(json.dumps([{"conversations": said}] * 3))
    flags = ["--dataset-name", "sharegpt", "--dataset-path", str(file), "--num-prompts", "3", *ONE]
    status, line = bench(server.url, *flags, "--tokenizer", str(checkpoint))
    assert status == 0
    assert line["output_tokens"] == 3 * len(byte_level().encode("hello hello").ids)
    status, line = bench(server.url, *flags, "--sharegpt-output-len", "2")
    assert (status, line["output_tokens"], line["sharegpt_output_len"]) == (0, 6, 2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dataset-name", "sharegpt"], "needs --dataset-path"),
        (["--dataset-path", "x.json"], "is for --dataset-name sharegpt"),
        (["--dataset-name", "sharegpt", "--dataset-path", "x"], "how long are the answers?"),
        (["--base-url", "ftp://127.0.0.1:1", "--model", "m"], "is no URL such as"),
        (["--base-url", "http://127.0.0.1:x", "--model", "m"], "Port"),
        (["--base-url", "127.0.0.1:1"], "unknown url type"),
    ],
)
def test_flags_that_cannot_be_are_one_line(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pagedserve: ") and says in line


@pytest.mark.parametrize(
    "flags",
    [["--num-prompts", "0"], ["--request-rate", "0"], ["--request-rate", "x"],
     ["--random-range-ratio", "1"], ["--metric-percentiles", "101"], ["--timeout", "inf"],
     ["--percentile-metrics", "speed"], ["--temperature", "-1"], ["--num-warmups", "-1"]],
)  # fmt: skip
def test_values_out_of_range_are_wrong_usage(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "serve", *flags])
    assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:1"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no answer from http://127.0.0.1:1" in shown.err and "pagedserve serve" in shown.err


def test_refused_connections_are_failed_requests(bench: Bench) -> None:
    status, line = bench("http://127.0.0.1:1", *SHORT, "--model", "m")
    assert (status, line["completed"], line["failed"]) == (1, 0, 6)
    assert line["errors"] == {"connection: Connection refused": 6}
    assert line["ttft_ms"] is None and line["output_tokens_per_s"] is None


def test_refused_requests_are_counted_with_the_servers_words(server: Server, bench: Bench) -> None:
    status, line = bench(server.url, *SHORT, "--model", "another")
    assert (status, line["failed"]) == (1, 6)
    ((error, count),) = line["errors"].items()
    assert count == 6 and error.startswith("HTTP 404: ") and "another" in error


def test_warm_up_that_fails_stops_the_run(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base-url", server.url, "--num-warmups", "1", "--model", "another"]
    assert main(["bench", "serve", *SHORT, *flags]) == 1
    assert "no warm-up request was answered: HTTP 404" in capsys.readouterr().err


def test_a_server_killed_in_the_middle_fails_what_was_under_way(
    checkpoint: Path, tmp_path: Path, bench: Bench
) -> None:
    with Server(tmp_path / "log", model=str(checkpoint), served_model_name="toy") as own:
        own.until_ready()

        def kill() -> None:
            while own.metric("num_requests_running") == 0:
                time.sleep(0.01)
            own.process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        status, line = bench(
            own.url, *ONE, *PLAIN, "--num-prompts", "4", "--random-input-len", "9",
            "--random-output-len", "2000", "--model", "toy",
        )  # fmt: skip
        killer.join()
    assert (status, line["completed"], line["failed"]) == (1, 0, 4)
    assert set(line["errors"]) <= {
        "the connection ended in the middle of an answer",
        "the connection ended without an answer",
        "connection: Connection reset by peer",
        "connection: Connection refused",
    }


def broken_off(write: Write, body: dict[str, Any]) -> None:
    write(HEAD + chunk(piece()) * 2)


def error_event(write: Write, body: dict[str, Any]) -> None:
    error = b'data: {"error":{"message":"out of luck","type":"server_error"}}\n\n'
    write(HEAD + chunk(piece()) + chunk(error) + chunk(DONE) + b"0\r\n\r\n")


def short(write: Write, body: dict[str, Any]) -> None:
    write(HEAD + chunk(piece()) * 3 + chunk(usage(3)) + chunk(DONE) + b"0\r\n\r\n")


def empty(write: Write, body: dict[str, Any]) -> None:
    write(HEAD + chunk(DONE) + b"0\r\n\r\n")


def silent(write: Write, body: dict[str, Any]) -> None:
    pass


def hanging(write: Write, body: dict[str, Any]) -> None:
    write(HEAD + chunk(piece()))
    time.sleep(0.8)


def other_protocol(write: Write, body: dict[str, Any]) -> None:
    write(b"220 mail.example ready\r\n")


def not_streamed(write: Write, body: dict[str, Any]) -> None:
    """It keeps the connection open, too."""
    text = b'{"choices":[{"text":"all at once"}]}'
    write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
    time.sleep(0.8)


def refusing(write: Write, body: dict[str, Any]) -> None:
    text = b"<html>too many</html>"
    write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
    time.sleep(0.8)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (broken_off, "the connection ended in the middle of an answer"),
        (error_event, "out of luck"),
        (short, "3 tokens of 4 asked for"),
        (empty, "an answer without a token"),
        (silent, "the connection ended without an answer"),
        (hanging, "no end within 0.4 s"),
        (other_protocol, "what listens there does not speak HTTP"),
        (not_streamed, "the connection ended in the middle of an answer"),
        (refusing, "HTTP 429: <html>too many</html>"),
    ],
)
def test_a_broken_answer_is_a_failure_that_says_what_broke(
    answer: Any, says: str, bench: Bench
) -> None:
    with Misbehaving(answer) as server:
        status, line = bench(server.url, *SHORT, "--model", "m", "--timeout", "0.4")
    assert (status, line["completed"], line["errors"]) == (1, 0, {says: 6})


def in_splinters(write: Write, body: dict[str, Any]) -> None:
    """The right answer, cut anywhere, with spaces in its JSON, its end by closing."""
    data = HEAD.replace(b"transfer-encoding: chunked\r\n", b"") + piece(" ") * body["max_tokens"]
    data += usage(body["max_tokens"]) + DONE
    for start in range(0, len(data), 7):
        write(data[start : start + 7])
        time.sleep(0.0005)


def test_an_answer_is_read_however_it_is_cut(bench: Bench) -> None:
    with Misbehaving(in_splinters) as server:
        status, line = bench(server.url, *SHORT, "--model", "m", "--num-prompts", "3")
    assert (status, line["completed"], line["output_tokens"]) == (0, 3, 12)
    assert line["input_tokens"] == 12 and line["itl_ms"]["p50"] > 0


def test_no_more_requests_are_under_way_than_allowed(bench: Bench) -> None:
    counted = Counted()
    with Misbehaving(counted) as server:
        status, line = bench(
            server.url, *SHORT, "--model", "m", "--num-prompts", "13", "--max-concurrency", "3",
            "--client-processes", "2",
        )  # fmt: skip
        assert status == 0 and line["completed"] == 13
        assert 2 <= counted.most <= 3
        assert len({json.dumps(body["prompt"]) for body in server.bodies}) == 13


def test_requests_come_at_their_times(bench: Bench) -> None:
    with Misbehaving(whole) as server:
        status, line = bench(
            server.url, *SHORT, "--model", "m", "--num-prompts", "9", "--request-rate", "20"
        )
    assert status == 0 and line["request_rate"] == 20.0
    assert line["duration_s"] > 0.1  # nine Poisson arrivals of this seed take longer


def test_requests_are_streamed_greedy_and_of_fixed_length(bench: Bench) -> None:
    with Misbehaving(whole) as server:
        status, _ = bench(server.url, *SHORT, "--model", "m", "--api-key", "secret")
        assert status == 0
        head, body = server.heads[0], server.bodies[0]
    assert len(server.heads) == 6 and "POST /v1/completions HTTP/1.1" in head
    assert "Authorization: Bearer secret" in head
    prompt = body.pop("prompt")
    assert len(prompt) == 9 and all(0 <= id < 1000 for id in prompt)
    assert body == {
        "model": "m",
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_answers_may_end_early_where_that_is_wanted(bench: Bench) -> None:
    with Misbehaving(short) as server:
        status, line = bench(server.url, *SHORT, "--model", "m", "--no-ignore-eos")
        assert status == 0 and line["output_tokens"] == 18
        assert all("ignore_eos" not in body for body in server.bodies)


def hanging_for_long(write: Write, body: dict[str, Any]) -> None:
    write(HEAD + chunk(piece()))
    time.sleep(2)


def test_an_interrupted_run_leaves_no_process_and_no_traceback() -> None:
    with Misbehaving(hanging_for_long) as server:
        command = [sys.executable, "-m", "pagedserve", "bench", "serve", "--base-url", server.url]
        process = subprocess.Popen(
            [*command, *SHORT, "--model", "m", "--num-prompts", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while len(server.bodies) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        (client,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in shown
    assert not Path(f"/proc/{client}").exists()


def test_outcomes_are_written_whole_where_a_write_takes_a_part() -> None:
    class Pipe(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data[:7]))

    sink, data = Pipe(), random.randbytes(100)
    write_all(sink, data)
    assert sink.getvalue() == data
