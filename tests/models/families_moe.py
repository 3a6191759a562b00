"""Families with experts: see `families`."""

from __future__ import annotations

from tests.models.case import Case

CASES_MOE: dict[str, Case] = {}
