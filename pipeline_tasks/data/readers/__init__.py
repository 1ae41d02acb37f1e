"""Readers of foreign formats: a folder is recognised by looking at it, and every format ends in the same tables."""

from pipeline_tasks.data.readers.reader import Reader, open_reader, read_folder
from pipeline_tasks.data.readers.recognition import FORMATS, Recognised, recognise

__all__ = ["FORMATS", "Reader", "Recognised", "open_reader", "read_folder", "recognise"]
