"""The services of docker-compose.yml as processes of this machine, where no container engine is.

What Compose would do is done from the file as Compose itself resolves it (`docker-compose config`): the services'
commands, variables, health checks, the order by `depends_on`, restarts. What a container would give is played by
plain substitution: a service's name and port become a free port of the loopback, a volume or a folder of an image
becomes a folder here. Limits, users (but Postgres's and Redis's) and namespaces are not played.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import services as processes

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = REPOSITORY / "docker-compose.yml"
PROGRAMS = Path(sys.executable).parent
LARGEST_PORT = 22000
"""weed adds 10000 for gRPC, and Linux hands out ports above 32768 to outgoing connections."""


def resolved(compose_program: Path, settings: Path, *profiles: str) -> dict[str, Any]:
    """The Compose file as Compose reads it, with the variables of a settings file."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    command = [str(compose_program), "--file", str(COMPOSE), "--env-file", str(settings), *chosen, "config"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(settings.parent)}
    done = subprocess.run([*command, "--format", "json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout.replace("$$", "$"))
    return content


def free_ports(count: int, _taken: set[int] = set()) -> list[int]:  # noqa: B006  # one set for the whole process
    """Ports where nobody listens, nor 10000 above."""
    found: list[int] = []
    port = 12000 + os.getpid() % 8000
    while len(found) < count:
        port = port + 1 if port < LARGEST_PORT else 12000
        if port not in _taken and all(_is_free(number) for number in (port, port + 10000)):
            found.append(port)
            _taken.add(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@dataclass
class Instance:
    """One container's worth of processes: a service on a machine."""

    service: str
    machine: str
    definition: dict[str, Any]
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = False
    starts: int = 0

    @property
    def name(self) -> str:
        return f"{self.service}@{self.machine}"

    @property
    def is_job(self) -> bool:
        """Whether it ends by itself."""
        return str(self.definition.get("restart", "")).startswith("on-failure")


@dataclass
class ComposeProcesses:
    """All instances of a resolved file.

    Args:
        file: what `resolved` returned.
        folder: where volumes and logs go.
        addresses: ports chosen beforehand, by service and port of the file.
        extra: variables that every process gets beside its own.
        second: services that run on a second machine too, with volumes of its own.
    """

    file: dict[str, Any]
    folder: Path
    addresses: dict[tuple[str, str], int]
    extra: Mapping[str, str] = field(default_factory=dict)
    second: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        placed = [(name, "one") for name in self.file["services"]] + [(name, "two") for name in self.second]
        self.instances = {f"{name}@{machine}": self._instance(name, machine) for name, machine in placed}
        self._watcher = threading.Thread(target=self._restart_what_ended, daemon=True)
        self._closing = threading.Event()

    def _instance(self, name: str, machine: str) -> Instance:
        definition = self.file["services"][name]
        ports = [str(port) for port in definition.get("expose", [])]
        ports += [port for port in re.findall(r"port=(\d{4,})", self._text(definition["command"])) if port not in ports]
        chosen = dict(zip(ports, free_ports(len(ports)), strict=True))
        if machine == "one":
            chosen |= {port: self.addresses[name, port] for port in ports if (name, port) in self.addresses}
        return Instance(name, machine, definition, chosen)

    @staticmethod
    def _text(command: Iterable[str]) -> str:
        return " ".join(command)

    # substitution ---------------------------------------------------------------------------------------

    def place(self, instance: Instance, path: str) -> Path:
        """Where a path inside the container is here."""
        for volume in sorted(instance.definition.get("volumes", []), key=lambda each: -len(each["target"])):
            if path == volume["target"] or path.startswith(volume["target"] + "/"):
                root = Path(volume["source"])
                if volume["type"] == "volume":
                    root = self.folder / instance.machine / volume["source"]
                return root / path.removeprefix(volume["target"]).lstrip("/")
        for inside, here in IMAGE_FOLDERS.items():
            if path.startswith(inside):
                return here / path.removeprefix(inside).lstrip("/")
        if path.startswith("/tmp"):
            return self.folder / instance.machine / "tmp" / instance.service / path.removeprefix("/tmp").lstrip("/")
        return Path(path)

    def here(self, instance: Instance, text: str) -> str:
        """A command's or a variable's text with this machine's addresses and folders."""
        for other in self.file["services"]:
            for port, free in self.instances[f"{other}@one"].ports.items():
                text = re.sub(rf"(?<![\w.-]){other}:{port}(?!\d)", f"127.0.0.1:{free}", text)
                text = re.sub(rf"@{other}:{port}(?!\d)", f"@127.0.0.1:{free}", text)
        for port, free in instance.ports.items():
            text = re.sub(rf"(?<![\d.]){port}(?!\d)", str(free), text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        roots = [volume["target"] for volume in instance.definition.get("volumes", [])]
        pattern = "|".join(sorted([*roots, *IMAGE_FOLDERS, "/tmp"], key=len, reverse=True))
        text = re.sub(
            rf"(?<![\w/.:-])({pattern})((?:/[\w.-]+)*)(?=[/\s\"']|$)",
            lambda match: str(self.place(instance, match[0])),
            text,
        )
        return text.replace("/opt/nasline/bin/nasline", STEP_COMMAND)

    def environment(self, instance: Instance) -> dict[str, str]:
        """The variables of an instance: its own, and nothing of this session but the search path."""
        given = {key: value for key, value in instance.definition.get("environment", {}).items() if value is not None}
        values = {key: self.here(instance, str(value)) for key, value in given.items()}
        if given.get("PGHOST") in self.file["services"]:
            database = self.instances[f"{given['PGHOST']}@one"]
            values |= {"PGHOST": "127.0.0.1", "PGPORT": str(database.ports[given["PGPORT"]])}
        path = os.pathsep.join([str(PROGRAMS), str(postgres_programs()), os.environ["PATH"]])
        base = {"PATH": path, "LANG": "C.UTF-8", "HOSTNAME": f"machine-{instance.machine}"}
        return {**base, **values, **self.extra}

    def command(self, instance: Instance) -> list[str]:
        """What an instance runs."""
        definition = instance.definition
        words = [*(definition.get("entrypoint") or []), *definition["command"]]
        return [self.here(instance, word) for word in words]

    # running --------------------------------------------------------------------------------------------

    def up(self, seconds: float) -> None:
        """Start all in the order that `depends_on` asks for and return when everything is healthy."""
        deadline = time.monotonic() + seconds
        waiting = list(self.instances.values())
        self._watcher.start()
        healthy: set[str] = set()
        while len(healthy) < len(self.instances):
            for instance in [each for each in waiting if self._may_start(each, healthy)]:
                waiting.remove(instance)
                self.start(instance)
            asked = [each for each in self.instances.values() if each.starts and each.name not in healthy]
            with ThreadPoolExecutor() as checks:
                answers = list(checks.map(self.is_ready, asked))
            healthy |= {each.name for each, ready in zip(asked, answers, strict=True) if ready}
            missing = sorted(set(self.instances) - healthy)
            assert time.monotonic() < deadline, f"not healthy: {missing}; {self.log_tail(missing[0])}"
            time.sleep(0.2)

    def _may_start(self, instance: Instance, healthy: set[str]) -> bool:
        return all(f"{name}@one" in healthy for name in instance.definition.get("depends_on", {}))

    def is_ready(self, instance: Instance) -> bool:
        """Whether a job has ended well, or a service's own health check says yes."""
        if instance.is_job:
            return instance.process is not None and instance.process.poll() == 0
        kind, *words = instance.definition["healthcheck"]["test"]
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        command = [self.here(instance, word) for word in command]
        done = subprocess.run(command, env=self.environment(instance), capture_output=True, cwd=self.folder)
        return done.returncode == 0

    def start(self, instance: Instance) -> None:
        """Start an instance, its volumes made first."""
        volumes = [each["target"] for each in instance.definition.get("volumes", []) if each["type"] == "volume"]
        for path in [*volumes, "/tmp"]:
            self.place(instance, path).mkdir(parents=True, exist_ok=True)
        user = unprivileged(instance.service)
        if instance.service == "postgres":
            self._initialise_postgres(instance, user)
        elif user:
            for path in volumes:
                os.chown(self.place(instance, path), user.pw_uid, user.pw_gid)
        instance.process = self._run(instance, self.command(instance), user)
        instance.wanted = not instance.is_job
        instance.starts += 1

    def _run(
        self, instance: Instance, command: list[str], user: pwd.struct_passwd | None = None, **variables: str
    ) -> subprocess.Popen[bytes]:
        with self.log(instance.name).open("ab") as output:
            return subprocess.Popen(
                command, env={**self.environment(instance), **variables}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, cwd=self.place(instance, "/tmp") if not user else "/", start_new_session=True,
                user=user.pw_name if user else None, group=user.pw_gid if user else None,
                extra_groups=[] if user else None,
            )  # fmt: skip

    def _initialise_postgres(self, instance: Instance, user: pwd.struct_passwd | None) -> None:
        """What the image's entry point does with an empty data folder: initdb, then the scripts of the init folder."""
        data = self.place(instance, "/var/lib/postgresql/data")
        instance.definition["environment"]["PGDATA"] = "/var/lib/postgresql/data"
        socket_folder = self.place(instance, "/tmp")
        if user:
            for folder in (data, socket_folder):
                os.chown(folder, user.pw_uid, user.pw_gid)
        if (data / "PG_VERSION").exists():
            return
        environment = self.environment(instance)
        options = environment["POSTGRES_INITDB_ARGS"].split()
        name = environment["POSTGRES_USER"]
        if user is None:  # not root here: "peer" would ask for a system user of that name
            options = [option.replace("peer", "trust") for option in options]
        local = {"PGHOST": str(socket_folder), "PGPORT": environment.get("PGPORT", "5432")}
        wait = [f"-o-c listen_addresses= -k {socket_folder} -p {local['PGPORT']}", "-w", "-D", str(data)]
        password = f"ALTER ROLE {name} PASSWORD '{environment['POSTGRES_PASSWORD']}'"
        scripts = sorted(self.place(instance, "/docker-entrypoint-initdb.d").glob("*.sh"))
        for command in (
            ["initdb", "--username", name, *options, "-D", str(data)], ["pg_ctl", *wait, "start"],
            *(["sh", "-c", script.read_text(encoding="utf-8")] for script in scripts),
            ["psql", "-U", name, "-d", "postgres", "-qc", password],
            ["pg_ctl", "-m", "fast", "-w", "-D", str(data), "stop"],
        ):  # fmt: skip
            code = self._run(instance, command, user, **local).wait()
            assert code == 0, f"{command[0]}: {self.log_tail(instance.name)}"
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all scram-sha-256\n")
        with (data / "postgresql.auto.conf").open("a") as own:  # where it listens is the container's matter
            own.write(f"listen_addresses = '127.0.0.1'\nport = {instance.ports['5432']}\n")
            own.write(f"unix_socket_directories = '{socket_folder}'\n")

    def stop(
        self, name: str, first: signal.Signals = signal.SIGTERM, patience: tuple[float, float, float] = (20, 5, 5)
    ) -> None:
        """Stop an instance as `docker compose stop` does, and leave it stopped."""
        instance = self.instances[name]
        instance.wanted = False
        if instance.process is not None:
            processes.stop_session(instance.process.pid, first, patience)
            instance.process.wait()

    def restart(self, name: str) -> None:
        """`docker compose restart`: its own stop signal, its own grace; returns when the instance is healthy again."""
        instance = self.instances[name]
        self.stop(name, signal.Signals[instance.definition.get("stop_signal", "SIGTERM")])
        self.start(instance)
        deadline = time.monotonic() + 60
        while not self.is_ready(instance):
            assert time.monotonic() < deadline, self.log_tail(name)
            time.sleep(0.2)

    def vanish(self, name: str) -> None:
        """Kill -9 of everything in an instance, never to come back: its machine is gone."""
        instance = self.instances[name]
        instance.wanted = False
        assert instance.process is not None
        for pid in self.processes_of(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        instance.process.wait()

    def down(self) -> None:
        """Stop everything, what depends on others first."""
        self._closing.set()
        for instance in self.instances.values():
            instance.wanted = False
        self._watcher.join()
        names = [name for name in self.instances if self.instances[name].service not in BASE]
        stopping = [threading.Thread(target=self.stop, args=(name, signal.SIGTERM, (10, 3, 3))) for name in names]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        for service in BASE:
            instance = self.instances[f"{service}@one"]
            self.stop(instance.name, signal.Signals[instance.definition.get("stop_signal", "SIGTERM")], (10, 3, 3))

    def processes_of(self, name: str) -> list[int]:
        """Its session, and the descendants that have made sessions of their own, as steps do."""
        process = self.instances[name].process
        if process is None:
            return []
        family = {process.pid, *processes.session_members(process.pid)}
        parents = process_parents()
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return sorted(family)

    def survivors(self) -> list[int]:
        """Processes of instances that still live."""
        started = [instance.process.pid for instance in self.instances.values() if instance.process]
        return [pid for leader in started for pid in processes.session_members(leader)]

    def _restart_what_ended(self) -> None:
        """`restart: unless-stopped` and `on-failure:N`."""
        while not self._closing.wait(0.5):
            for instance in self.instances.values():
                process, policy = instance.process, str(instance.definition.get("restart", "no"))
                if process is None or process.poll() is None:
                    continue
                failed_job = instance.is_job and process.returncode and instance.starts <= int(policy.partition(":")[2])
                if (instance.wanted and policy == "unless-stopped") or failed_job:
                    self.start(instance)

    # looking --------------------------------------------------------------------------------------------

    def log(self, name: str) -> Path:
        """Standard output and error of an instance."""
        return self.folder / f"{name}.log"

    def log_tail(self, name: str, characters: int = 3000) -> str:
        """The end of an instance's log."""
        log = self.log(name)
        return log.read_text(encoding="utf-8", errors="replace")[-characters:] if log.exists() else "(no log)"


BASE = ("mlflow", "s3", "redis", "postgres")
IMAGE_FOLDERS = {"/srv/nasline": REPOSITORY, "/srv/mlflow": REPOSITORY / "mlflow"}
STEP_COMMAND = f"{sys.executable} -m pipeline_tasks"


def postgres_programs() -> Path:
    """Folder of initdb and postgres, which Debian keeps out of the search path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "PostgreSQL is not installed: apt-get install postgresql"
    return found[-1].parent


def process_parents() -> dict[int, int]:
    """Parent of each living process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    return parents


def unprivileged(service: str) -> pwd.struct_passwd | None:
    """The user that Debian's package made for a service that refuses to run as root, or should not."""
    if os.geteuid() != 0 or service not in ("postgres", "redis"):
        return None
    return pwd.getpwnam(service)
