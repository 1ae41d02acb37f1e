"""Create or migrate Airflow's database and create the pools the DAGs name; run with AIRFLOW_HOME set.

In one process, since each call of the `airflow` command costs seconds of imports.
"""

from __future__ import annotations

import os

ACCELERATOR_POOL = "accelerator"


def prepare() -> None:
    """Bring the database to this version of Airflow and give the accelerator pool its slots (default 1)."""
    from airflow.models.pool import Pool
    from airflow.utils.db import initdb

    initdb()
    slots = int(os.environ.get("NASLINE_ACCELERATOR_SLOTS", "1"))
    description = "Training and labelling tasks: one slot for each accelerator (GPU, or the CPU's cores)"
    Pool.create_or_update_pool(ACCELERATOR_POOL, slots, description, include_deferred=False)


if __name__ == "__main__":
    prepare()
