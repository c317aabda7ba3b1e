"""Several processes: their places, and who has which rows of a batch; `tests/slow` starts them."""

from __future__ import annotations

import pytest
import torch

from dd_core.errors import InvalidRequestError, RecipeError
from training import parallel
from training.data.conditions import TextConditions
from training.parallel import Part, parts, pick_rank_device, world


def test_a_batch_is_dealt_out_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of all ranks together are the batch, and its first rows are spread over them."""
    monkeypatch.setattr(parallel, "_ranks", lambda: (1, 2))
    assert [list(range(12))[p.rows] for p in parts(12, 3, "batch")] == [[1, 7], [3, 9], [5, 11]]
    assert [p.among(4) for p in parts(12, 3, "batch")] == [1, 1, 0]
    assert Part().among(4) == 4 and Part().rows == slice(0, None, 1)
    with pytest.raises(
        RecipeError, match=r"teacher\.batch is 8, which 2 processes times accumulate=3"
    ) as refused:
        parts(8, 3, "teacher.batch")
    assert refused.value.param == "teacher.batch"


def test_a_process_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world() == parallel.World(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert world() == parallel.World(3, 4, 1)
    assert pick_rank_device("cpu") == torch.device("cpu")
    with pytest.raises(RecipeError, match="one GPU to 4 processes"):
        pick_rank_device("cuda:0")
    with pytest.raises(InvalidRequestError, match="must be auto"):
        pick_rank_device("tpu")
    monkeypatch.delenv("RANK")
    with pytest.raises(RecipeError, match=r"torchrun, which sets RANK=, WORLD_SIZE=4"):
        world()


def test_captions_are_drawn_once_for_the_whole_batch() -> None:
    """Rows taken afterwards have the texts that they had in the batch."""
    known = TextConditions(
        torch.arange(6.0)[:, None, None], torch.ones(6, 1, dtype=torch.bool), torch.arange(6).view(2, 3)
    )
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    torch.manual_seed(3)
    whole = known(labels)
    torch.manual_seed(3)
    picked = known.pick(labels)
    assert torch.equal(picked // 3, labels)
    assert torch.equal(known.of(picked[1::2]).states_BTN, whole.states_BTN[1::2])
