"""One run of the DAG train_yolo_nas in this process: `python demo/airflow_run.py FORM_VALUES_JSON`.

The real operator starts the real steps; only the scheduler and the servers are left out (`dag.test()`). Needs
AIRFLOW_HOME and prints, as its last line, the run's name and state as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    """Prepare the database, run the DAG, tell how it ended."""
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "dags"), str(REPOSITORY / "stack")]
    import airflow_database

    airflow_database.prepare()
    import step_operator
    import train_yolo_nas

    dag = train_yolo_nas.start.dag
    assert dag is not None
    finished = dag.test(run_conf=json.loads(sys.argv[1]))
    print(json.dumps({"run": step_operator.run_name(finished.run_id), "state": str(finished.state)}))
    return 0 if finished.state == "success" else 1


if __name__ == "__main__":
    raise SystemExit(main())
