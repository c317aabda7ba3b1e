"""Features: the rebuilt network is the file's, and work done is never done again."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core.errors import InvalidRequestError
from tests.training.fakes import Mean
from tests.training.helpers import pictures_like
from training.data.packages import DataError
from training.metrics.features import FeatureExtractor, features_of, legacy_resize
from training.metrics.inception import Inception

CACHE = Path(os.environ.get("DD_CACHE", Path.home() / ".cache" / "distilled-decoding"))
WEIGHTS = CACHE / "inception-fid.pt"
needs_inception = pytest.mark.skipif(
    not WEIGHTS.exists(), reason=f"no Inception weights at {WEIGHTS} (`dd-train evaluate` fetches them)"
)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor(weights=WEIGHTS)


@needs_inception
def test_rebuilt_network_is_the_file(extractor: FeatureExtractor) -> None:
    """Folding and rearranging change nothing but rounding (features are about 0.3 on average)."""
    pictures = pictures_like(3)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.load(str(WEIGHTS), map_location="cpu").eval()
        expected = script((legacy_resize(pictures) - 128) / 128)
    found = extractor(pictures)
    assert found.shape == (3, 2048)
    assert float(expected.mean()) > 0.1
    assert float((found - expected).abs().max()) < 1e-4


@needs_inception
def test_bfloat16_stays_near_float32(extractor: FeatureExtractor) -> None:
    """Measured on test images: 2.6% relative error, cosine above 0.999."""
    pictures = pictures_like(3)
    exact, rough = extractor(pictures), FeatureExtractor(precision="bfloat16", weights=WEIGHTS)(pictures)
    assert rough.dtype == torch.float32
    error = (rough - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < float(error.max()) < 0.08


@needs_inception
def test_a_picture_alone_has_the_features_it_has_in_a_batch(extractor: FeatureExtractor) -> None:
    pictures = pictures_like(3)
    assert torch.allclose(extractor(pictures)[1:2], extractor(pictures[1:2]), atol=1e-4)


def test_features_go_on_where_a_killed_run_stopped(tmp_path: Path) -> None:
    pictures = pictures_like(1200)
    killed = Mean(stop_after=1000)
    with pytest.raises(KeyboardInterrupt):
        features_of(pictures, killed, tmp_path)
    assert killed.seen == 1000
    resumed = Mean()
    found = features_of(pictures, resumed, tmp_path)
    assert resumed.seen == 200
    assert torch.equal(found, pictures.float().mean((2, 3)))


def test_features_are_kept_by_content(tmp_path: Path) -> None:
    """Parts of a known set cost nothing; a changed pixel, network or precision is another content."""
    pictures = pictures_like(1000)
    features_of(pictures, Mean(), tmp_path)
    again = Mean()
    assert torch.equal(features_of(pictures[500:], again, tmp_path), pictures[500:].float().mean((2, 3)))
    assert again.seen == 0
    changed = pictures.clone()
    changed[3, 0, 0, 0] ^= 1
    other = Mean()
    features_of(changed, other, tmp_path)
    assert other.seen == 500
    network = Mean("another")
    features_of(pictures, network, tmp_path)
    assert network.seen == 1000
    rough = Mean()
    rough.precision = "bfloat16"
    features_of(pictures, rough, tmp_path)
    assert rough.seen == 1000


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_what_is_no_set_of_images_is_refused(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="uint8 images"):
        features_of(images, Mean(), tmp_path)


def test_a_file_that_is_not_the_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.pt"
    path.write_bytes(b"not a TorchScript archive")
    with pytest.raises(DataError, match=r"wrong\.pt"):
        Inception(path)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="float32, bfloat16"):
        FeatureExtractor(precision="float8")  # type: ignore[arg-type]
