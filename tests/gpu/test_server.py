"""A server on a CUDA device. Skipped where there is none, and where the server's packages are missing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from tests.server.helpers import running
from tests.tiny import tiny_bundle
from tests.tiny_var import tiny_var_bundle


@pytest.mark.parametrize("determinism", ["exact", "fast"])
@pytest.mark.parametrize("make", [tiny_bundle, tiny_var_bundle])
def test_a_server_answers_from_the_gpu(tmp_path: Path, make: object, determinism: str) -> None:
    """In exact mode with the same bytes alone and among others."""
    assert callable(make)
    with running(make(tmp_path / "bundle"), device="auto", determinism=determinism, max_batch=8) as live:

        def picture(seed: int) -> bytes:
            body = {"label": seed % 10, "seed": seed, "steps": 1 + seed % 2, "brownout": False}
            reply = live.client.post("/generate", json=body, headers={"accept": "image/png"})
            assert reply.status_code == 200, reply.text
            return reply.content

        alone = [picture(seed) for seed in range(3)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(picture, range(16)))
        assert determinism == "fast" or together[:3] == alone
        metrics = live.client.get("/metrics").text
        assert 'dd_device_memory_bytes{device="cuda:0",kind="allocated"}' in metrics
