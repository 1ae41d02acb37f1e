"""One-shot of the Compose stack: Airflow's database, the accelerator pool and the administrator, in one process.

Environment, beside Airflow's own: AIRFLOW_ADMIN_USER and AIRFLOW_ADMIN_PASSWORD. The user is made where it is missing
and otherwise given this password, so that a new one in `.env` takes effect; other users are left alone.
"""

from __future__ import annotations

import os

import airflow_database


def ensure_administrator(name: str, password: str) -> str:
    """Make the user with the role Admin, or set its password; says which."""
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as builder:
        users = builder.sm
        users.sync_roles()
        found = users.find_user(name)
        if found is not None:
            users.reset_password(found.id, password)
            return f"user {name} is there; its password is the one of this environment"
        if not users.add_user(name, name, "Nasline", f"{name}@localhost", users.find_role("Admin"), password):
            raise SystemExit(f"the user {name} could not be made; the lines above say why")
        return f"user {name} made, with the role Admin"


def main() -> None:
    """Prepare everything the other services wait for."""
    name, password = (os.environ.get(key, "") for key in ("AIRFLOW_ADMIN_USER", "AIRFLOW_ADMIN_PASSWORD"))
    if not name or not password:
        raise SystemExit("AIRFLOW_ADMIN_USER and AIRFLOW_ADMIN_PASSWORD must be set; `make secrets` writes .env")
    airflow_database.prepare()
    print(ensure_administrator(name, password))


if __name__ == "__main__":
    main()
