"""`make secrets`: write `.env` from `.env.example`, with a random value for each variable that is empty there.

The file is made readable by its owner only. One that is there already keeps every line; what it lacks, since a later
release asks for it, is added at its end. Standard library only.
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
GIVEN = re.compile(r"^[ \t]*(?:export[ \t]+)?([A-Z][A-Z0-9_]*)[ \t]*[=:][ \t]*[^\s#]", re.MULTILINE)
"""A line of a settings file that gives a value, in each form that Compose reads."""


def random_value(name: str) -> str:
    """238 random bits; a Fernet key in the form Airflow asks for."""
    if name.endswith("_FERNET_KEY"):
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return "".join(secrets.choice(ALPHABET) for _ in range(40))


def filled(example: str) -> str:
    """The example with every empty variable filled."""
    return EMPTY.sub(lambda match: f"{match[1]}={random_value(match[1])}", example)


def write(example: Path, target: Path) -> None:
    """Write the file, 0600, or add to one that is there what it lacks."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return complete(example, target)
    with os.fdopen(descriptor, "w", encoding="utf-8") as output:
        output.write(filled(example.read_text(encoding="utf-8")))
    print(f"{target} written; the first logins are admin with AIRFLOW_ADMIN_PASSWORD and MLFLOW_ADMIN_PASSWORD in it")


def complete(example: Path, target: Path) -> None:
    """Add the variables that a settings file has no value for, and tell their names."""
    text = target.read_text(encoding="utf-8")
    given = set(GIVEN.findall(text))
    missing = [name for name in EMPTY.findall(example.read_text(encoding="utf-8")) if name not in given]
    if not missing:
        print(
            f"{target} is there already with every secret and was left as it is; docs/deploy.md says how to change one"
        )
        return
    lines = "".join(f"{name}={random_value(name)}\n" for name in missing)
    with target.open("a", encoding="utf-8") as output:  # Compose takes the last of two lines with one name
        output.write(lines if not text or text.endswith("\n") else f"\n{lines}")
    print(f"{target} is there already; added {', '.join(missing)}, which it lacked, and left the rest as it is")


if __name__ == "__main__":
    write(REPOSITORY / ".env.example", Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / ".env")
