"""What the processes of one training step tell each other: the first one leases, tracks and publishes, all train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_tasks import launch
from pipeline_tasks.errors import EXIT_DONE

if TYPE_CHECKING:
    from pipeline_tasks.params import StartParameters


class Helped(Exception):
    """This process has done its share of a training; the first one goes on alone."""


class Team:
    """The processes that torchrun started for a step.

    Args:
        shared: The run's section `start`; with CUDA each process takes the device of its place on the machine. None
            for a step that one process runs alone: every call then does nothing.

    Raises:
        ConfigurationError: there are fewer devices than processes.
    """

    def __init__(self, shared: StartParameters | None = None) -> None:
        self._undecided = shared is not None
        if shared is not None:
            launch.own_device(shared.device)
            from model import processes
            from pipeline_tasks.training_task import prepare_torch

            processes.join(prepare_torch(shared))

    def tell(self, exit_code: int | None) -> None:
        """As the first process: let the others work (None), or end with this exit code; what is told first counts."""
        if self._undecided:
            from model import processes

            self._undecided = False
            processes.from_first(exit_code)

    def hear(self) -> int | None:
        """As one of the others: what the first process told."""
        from model import processes

        return processes.from_first(EXIT_DONE)


def end_of_training() -> None:
    """The first process goes on alone.

    Raises:
        Helped: in every other one.
    """
    if launch.is_member():
        from model import processes

        processes.part()
        if launch.rank() > 0:
            raise Helped
