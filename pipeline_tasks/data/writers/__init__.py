"""Writers of foreign formats; what a format cannot hold is counted, never dropped in silence."""

from pipeline_tasks.data.writers.content import Lost
from pipeline_tasks.data.writers.writer import WRITABLE, Written, write_folder

__all__ = ["WRITABLE", "Lost", "Written", "write_folder"]
