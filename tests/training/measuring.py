"""`dd-train` with a network that is a mean and small chunks, for torchrun to start.

torchrun --nproc_per_node 2 -m tests.training.measuring evaluate …
"""

from __future__ import annotations

import torch

from tests.training.fakes import Mean
from training import cli, guidance
from training.metrics import chunks, features, reference
from training.stages import evaluate, student_fid


def main() -> None:
    """The command line of `dd-train`."""
    torch.set_num_threads(1)
    for module in (cli, evaluate, guidance, student_fid):
        setattr(module, "FeatureExtractor", lambda *_: Mean())  # noqa: B010
    for module in (chunks, features, reference):
        setattr(module, "CHUNK", 8)  # noqa: B010
    cli.main()


if __name__ == "__main__":
    main()
