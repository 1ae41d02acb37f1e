"""Texts of foreign files in logs, sheets and pages."""

from __future__ import annotations


def plain_text(text: str) -> str:
    """The text with everything that cannot be seen (control, direction and line characters) spelt out: \\x1b."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
