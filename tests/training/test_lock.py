"""One command at a time works in a run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dd_core.errors import RecipeError
from training.lock import locked

HOLDER = """
import sys
from pathlib import Path
from training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_with_the_process_until_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match=f"in use by process {holder.pid};"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().strip() != str(holder.pid)
    with locked(tmp_path):
        pass
