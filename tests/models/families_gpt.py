"""Families that resemble GPT: see `families`."""

from __future__ import annotations

from tests.models.case import Case

CASES_GPT: dict[str, Case] = {}
