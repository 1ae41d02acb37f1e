"""Errors that end a step with one sentence and an exit code (the codes are DESIGN's contract with Airflow)."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_UNFORESEEN = 1


class StepError(Exception):
    """A failure whose message is meant for the user: it names what was wrong, the value and the remedy."""

    exit_code = EXIT_UNFORESEEN


class UsageError(StepError):
    """The command line itself is wrong."""

    exit_code = 2


class DataError(StepError):
    """The data cannot be used as they are."""

    exit_code = 65


class ParameterError(StepError):
    """A value in params.yaml, the trigger form or an option is unknown or out of range."""

    exit_code = 65


class UnavailableError(StepError):
    """A service (tracking server, object store, registry) does not answer; trying again may cure it."""

    exit_code = 69


class TemporaryError(StepError):
    """The step was told to stop, or another process holds its output; starting it again goes on from there."""

    exit_code = 75


class StoppedError(TemporaryError):
    """This process was told to stop; whoever takes interruptions for faults of another can tell this one."""


class ConfigurationError(StepError):
    """The machine or the installation lacks something the step needs (device, runtime, package)."""

    exit_code = 78


class RejectedError(StepError):
    """The gate judged the engine and said no."""

    exit_code = 99
