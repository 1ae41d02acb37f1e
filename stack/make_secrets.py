"""`make secrets`: write `.env` from `.env.example`, with a random value for each variable that is empty there.

The file is made readable by its owner only and is never overwritten. Standard library only.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import string
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ALPHABET = string.ascii_letters + string.digits
"""Values stand in addresses and in settings files, where other characters would have to be escaped."""

EMPTY = re.compile(r"^([A-Z][A-Z0-9_]*)=$", re.MULTILINE)


def random_value(name: str) -> str:
    """238 random bits; a Fernet key in the form Airflow asks for."""
    if name.endswith("_FERNET_KEY"):
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return "".join(secrets.choice(ALPHABET) for _ in range(40))


def filled(example: str) -> str:
    """The example with every empty variable filled."""
    return EMPTY.sub(lambda match: f"{match[1]}={random_value(match[1])}", example)


def write(example: Path, target: Path) -> None:
    """Write the file, 0600.

    Raises:
        SystemExit: it is there already.
    """
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SystemExit(
            f"{target} is there already, and a stack may run with its secrets; it was left as it is. "
            "docs/deploy.md says how to change one"
        ) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as output:
        output.write(filled(example.read_text(encoding="utf-8")))
    print(f"{target} written; the first logins are admin with AIRFLOW_ADMIN_PASSWORD and MLFLOW_ADMIN_PASSWORD in it")


if __name__ == "__main__":
    write(REPOSITORY / ".env.example", Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / ".env")
