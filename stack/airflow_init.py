"""One-shot of the Compose stack: Airflow's database, the accelerator pool and two users, in one process.

Environment, beside Airflow's own: AIRFLOW_ADMIN_USER and AIRFLOW_ADMIN_PASSWORD; AIRFLOW_PIPELINE_USER and
AIRFLOW_PIPELINE_PASSWORD. A user is made where it is missing and otherwise given this password, so that a new one in
`.env` takes effect; other users are left alone.
"""

from __future__ import annotations

import os
from typing import Any

import airflow_database

PIPELINE_ROLE = "Nasline"
PIPELINE_RIGHTS = [
    ("can_edit", "Task Instances"),
    ("can_edit", "DAG Runs"),  # Airflow asks for both where a task's note is set
    ("can_edit", "DAG:train_yolo_nas"),
    ("can_edit", "DAG:retrain_yolo_nas"),
]
"""Enough to set the note of a task of the two chains, and to change the state of their tasks, for which Airflow has no
right of its own. Nothing can be read, triggered or approved with it, and no other DAG's tasks be changed."""


def ensure_users(administrator: tuple[str, str], pipeline: tuple[str, str]) -> list[str]:
    """Make both users (name and password) with their roles, or set their passwords; says which."""
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as builder:
        users = builder.sm
        users.sync_roles()
        users.bulk_sync_roles([{"role": PIPELINE_ROLE, "perms": PIPELINE_RIGHTS}])
        return [_ensure(users, *administrator, "Admin"), _ensure(users, *pipeline, PIPELINE_ROLE)]


def _ensure(users: Any, name: str, password: str, role: str) -> str:
    found = users.find_user(name)
    if found is not None:
        users.reset_password(found.id, password)
        return f"user {name} is there; its password is the one of this environment"
    if not users.add_user(name, name, "Nasline", f"{name}@localhost", users.find_role(role), password):
        raise SystemExit(f"the user {name} could not be made; the lines above say why")
    return f"user {name} made, with the role {role}"


def main() -> None:
    """Prepare everything the other services wait for."""
    administrator, pipeline = _login("AIRFLOW_ADMIN"), _login("AIRFLOW_PIPELINE")
    airflow_database.prepare()
    print("\n".join(ensure_users(administrator, pipeline)))


def _login(who: str) -> tuple[str, str]:
    name, password = (os.environ.get(f"{who}_{part}", "") for part in ("USER", "PASSWORD"))
    if not name or not password:
        raise SystemExit(f"{who}_USER and {who}_PASSWORD must be set; `make secrets` writes .env")
    return name, password


if __name__ == "__main__":
    main()
