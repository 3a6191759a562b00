"""Figures from moments, against numpy and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pagedserve.commands.bench.figures import Outcome, percentile, spread, summary, table


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("part", [0, 12.5, 50, 99, 100])
def test_percentiles_are_numpys(count: int, part: float) -> None:
    values = sorted(random.random() for _ in range(count))
    assert percentile(values, part) == pytest.approx(np.percentile(values, part))


def test_figures_are_what_their_names_say() -> None:
    outcomes = [
        Outcome(10.0, [10.5, 10.6, 10.9], num_prompt=7, num_tokens=3, status=200),
        Outcome(10.25, [12.25], num_prompt=5, num_tokens=1, status=200),
    ]
    found = summary(outcomes, [50])
    assert (found["completed"], found["failed"], found["errors"]) == (2, 0, {})
    assert (found["input_tokens"], found["output_tokens"]) == (12, 4)
    assert found["duration_s"] == 2.25  # from the first request to the last token
    assert found["output_tokens_per_s"] == round(4 / 2.25, 3)
    assert found["total_tokens_per_s"] == round(16 / 2.25, 3)
    assert found["ttft_ms"] == {"mean": 1250.0, "p50": 1250.0}
    assert found["tpot_ms"] == {"mean": 200.0, "p50": 200.0}  # one token has no time per token
    assert found["itl_ms"] == {"mean": 200.0, "p50": 200.0}
    assert found["e2e_ms"] == {"mean": 1450.0, "p50": 1450.0}


def test_time_per_token_counts_tokens_and_gaps_count_pieces() -> None:
    """A piece may bring several tokens."""
    found = summary([Outcome(0.0, [1.0, 1.4], num_prompt=1, num_tokens=5, status=200)], [50])
    assert found["tpot_ms"]["mean"] == 100.0 and found["itl_ms"]["mean"] == 400.0


def test_failures_are_counted_and_are_in_no_other_figure() -> None:
    good = Outcome(0.0, [1.0, 2.0], num_prompt=1, num_tokens=2, status=200)
    bad = Outcome(0.0, [0.1, 9.0], num_prompt=1, num_tokens=2, status=200, error="it broke")
    found = summary([good, bad, bad])
    assert (found["completed"], found["failed"]) == (1, 2)
    assert found["errors"] == {"it broke": 2}
    assert found["output_tokens"] == 2 and found["duration_s"] == 2.0
    assert found["ttft_ms"]["mean"] == 1000.0


def test_without_an_answer_there_are_no_figures() -> None:
    found = summary([Outcome(5.0, error="no")])
    assert found["failed"] == 1
    assert all(found[n] is None for n in ("ttft_ms", "tpot_ms", "itl_ms", "output_tokens_per_s"))
    assert any("1 × no" in line for line in table(found))


def test_where_a_server_sends_no_usage_pieces_are_counted_and_it_is_said() -> None:
    found = summary([Outcome(0.0, [1.0, 2.0, 3.0], status=200)])
    assert found["output_tokens"] == 3
    assert found["tokens_counted_by"] == "pieces: the server sends no usage"


def test_a_spread_of_nothing_is_nothing() -> None:
    assert spread([]) is None
    assert spread([0.25], [99.9]) == {"mean": 250.0, "p99.9": 250.0}
