"""Two processes that accumulate their shares of two batches teach what one process learns from all images at once.

Run as a program this file is one of the two: ``test_accumulation_processes.py FILE``, with torchrun's environment.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_accumulation import detection, gradients, pictures

SHARES = ([[0, 1], [4]], [[2, 3], [5]])  # of each process: its parts of two batches


@pytest.mark.slow
def test_two_accumulating_processes_equal_one_with_all_images(repository: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(repository), str(repository / "tests/model")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, str(tmp_path / "process")]
    both = [subprocess.Popen(command, env={**environment, "RANK": rank}) for rank in "01"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    expected, losses = gradients(detection, [pictures([0, 1, 2, 3, 4, 5])])
    for rank in (0, 1):
        found = load_file(tmp_path / f"process{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)  # float64, order of sums
        told = json.loads((tmp_path / f"process{rank}.json").read_text())
        assert told == pytest.approx(losses, rel=1e-6)  # told in float32


def main(path: str) -> None:
    """Take one step on this process's share; write its gradients and losses."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found, losses = gradients(detection, [pictures(part) for part in SHARES[rank]])
    save_file({name: gradient.contiguous() for name, gradient in found.items()}, f"{path}{rank}.safetensors")
    Path(f"{path}{rank}.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
