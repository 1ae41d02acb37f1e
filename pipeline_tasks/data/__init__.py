"""Readers of foreign dataset formats, and DVC."""
