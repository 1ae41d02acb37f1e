"""Fixtures of the chain's tests."""

from __future__ import annotations

from typed_chain import finished, small_digits  # noqa: F401
