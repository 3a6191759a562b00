"""Dense families that resemble Llama: see `families`."""

from __future__ import annotations

from tests.models.case import Case

CASES_DENSE: dict[str, Case] = {}
