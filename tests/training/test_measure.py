"""Evaluation of a bundle against a folder, statistics or captions: its figures, its files, its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dd_core.bundle import load_bundle
from dd_core.errors import DDError, InvalidRequestError
from dd_core.hub.registry import find_spec
from dd_core.sampling import sample_images
from tests.tiny import tiny_bundle
from tests.tiny_text import tiny_text_bundle
from tests.training.clip_model import tiny_clip
from tests.training.fakes import Mean
from tests.training.helpers import pictures_like
from training import cli
from training.data.images import SUFFIXES
from training.measure import Request, Subject, measure
from training.metrics import chunks
from training.metrics.classifier import Classifier
from training.metrics.clip import ClipScore
from training.metrics.fid import frechet_distance, inception_score, kernel_distance, precision_recall
from training.metrics.paper import paper_figures
from training.metrics.reference import picture_files, read_reference

CPU = torch.device("cpu")
REAL = pictures_like(30, seed=5)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chunks, "CHUNK", 16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty pictures in sub-folders, one of another size, one file that is none."""
    folder = tmp_path / "real"
    for i, image in enumerate(REAL):
        place = folder / f"class-{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        (picture.resize((48, 40)) if i == 7 else picture).save(place / f"{i:03d}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "readme.md").write_text("not meant to be one")
    return folder


def _request(reference: Path, **changed: object) -> Request:
    asked = Request(reference, images=40, plans=("dd-1", "onestep"), batch=8, seed=3, timing=False)
    return replace(asked, **changed)  # type: ignore[arg-type]


def _loaded(folder: Path) -> Iterator[Tensor]:
    for path in sorted(p for p in folder.rglob("*.png")):
        yield torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_a_bundle_is_measured_against_a_folder(bundle: Path, folder: Path, tmp_path: Path) -> None:
    subject = Subject.of_bundle(str(bundle), CPU)
    rows = {r.name: r for r in measure(subject, _request(folder), Mean(), tmp_path / "out")}
    assert list(rows) == ["dd-1", "onestep"]
    npz = np.load(tmp_path / "out" / "samples" / "dd-1.npz")
    assert npz["arr_0"].shape == (40, 32, 32, 3) and npz["arr_0"].dtype == np.uint8
    assert npz["arr_1"].tolist() == [i % 10 for i in range(40)]
    sampler, plan = replace(subject.sampler, exact=False), subject.plans[0]
    keys = [(3, i) for i in range(32, 40)]
    assert np.array_equal(npz["arr_0"][32:], sample_images(sampler, plan, [i % 10 for _, i in keys], keys))
    real = torch.stack([image.float().mean((1, 2)) for image in _loaded(folder)])
    drawn = Mean()(torch.from_numpy(npz["arr_0"]).permute(0, 3, 1, 2))
    row = rows["dd-1"]
    assert (row.images, row.reference_images, row.manifold_images, row.passes) == (40, 30, 30, 1)
    assert row.fid == pytest.approx(frechet_distance(real, drawn), rel=1e-4)
    assert row.kid == pytest.approx(kernel_distance(real, drawn)[0], rel=1e-4)
    assert (row.precision, row.recall) == pytest.approx(precision_recall(real, drawn[:30]))
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "1 files of the folder are no readable pictures" in text
    assert "IS is missing" in text and "FID, paper" not in text
    assert not list((tmp_path / "out" / "chunks").iterdir())


def test_a_killed_evaluation_draws_no_chunk_twice(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject.of_bundle(str(bundle), CPU)
    request = _request(folder, plans=("dd-1",))
    whole = measure(subject, request, Mean(), tmp_path / "whole")
    drawn = 0

    def counted(*args: object) -> Tensor:
        nonlocal drawn
        drawn += 1
        if drawn == 4:  # in the second chunk, of 16 images in two batches
            raise KeyboardInterrupt
        return sample_images(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(chunks, "sample_images", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(subject, request, Mean(), tmp_path / "killed")
    assert measure(subject, request, Mean(), tmp_path / "killed") == whole
    assert drawn == 4 + 3  # two batches of the second chunk again, and the last one
    assert measure(subject, request, Mean(), tmp_path / "killed") == whole
    assert drawn == 7
    files = [tmp_path / name / "samples" / "dd-1.npz" for name in ("whole", "killed")]
    one, two = (np.load(path)["arr_0"] for path in files)
    assert np.array_equal(one, two)


def test_statistics_give_fid_and_what_lies_beside_them_the_rest(
    bundle: Path, folder: Path, tmp_path: Path
) -> None:
    features = Mean()(REAL).double().numpy()
    statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    statistics |= {"mu_s": np.zeros(2), "sigma_s": np.zeros((2, 2))}
    pictures = REAL.permute(0, 2, 3, 1).numpy()
    files = {
        "statistics": statistics,
        "adm": statistics | {"arr_0": pictures[:20]},
        "features": {"activations": features.astype(np.float32)},
        "pictures": {"arr_0": pictures},
    }
    subject, rows = Subject.of_bundle(str(bundle), CPU), {}
    for name, content in files.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        request = _request(tmp_path / f"{name}.npz", plans=("dd-1",), samples=False)
        [rows[name]] = measure(subject, request, Mean(), tmp_path / "out" / name)
        assert not (tmp_path / "out" / name / "samples" / "dd-1.npz").exists()
    for row in rows.values():
        assert row.fid == pytest.approx(rows["features"].fid, rel=1e-6)
    assert rows["statistics"].kid is None and rows["statistics"].precision is None
    assert rows["pictures"].kid == pytest.approx(rows["features"].kid)
    assert (rows["adm"].manifold_images, rows["pictures"].manifold_images) == (20, 30)
    assert (
        "KID, precision and recall need its pictures"
        in (tmp_path / "out" / "statistics" / "evaluation.md").read_text()
    )


def test_a_reference_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "a.png")
    np.savez(tmp_path / "keys.npz", mean=np.zeros(3))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "sigma.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "narrow.npz", activations=np.zeros((12, 2), np.float32))
    (tmp_path / "broken").mkdir()
    for i in range(12):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"no picture")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((12, 8, 8, 3)))
    (tmp_path / "no.npz").write_bytes(b"PK no archive")
    for name, message in {
        "nowhere": "neither a folder",
        "empty": "holds no pictures",
        "few": "1 real images",
        "keys.npz": "has the keys mean; a reference has mu and sigma",
        "wide.npz": r"mu is \[4\], of another network than ours, whose features are 3 wide",
        "sigma.npz": r"sigma is \[4, 4\], of another network than ours, whose features are 3 wide",
        "narrow.npz": r"activations is \[12, 2\], of another network than ours, whose features are 3 wide",
        "broken": "has 0 real images; the figures need 10 or more",
        "floats.npz": "must be uint8 pictures",
        "no.npz": "not an .npz that can be read",
    }.items():
        with pytest.raises(DDError, match=message) as refused:
            read_reference(tmp_path / name, Mean())
        assert "\n" not in refused.value.message and refused.value.param == "reference"


def test_a_reference_is_of_the_same_kinds_of_files_as_images_to_learn_from(tmp_path: Path) -> None:
    """AVIF, which Pillow writes and reads, was no picture to it."""
    for i, image in enumerate(REAL[:12]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.avif")
    assert read_reference(tmp_path, Mean()).images == 12
    assert {path.suffix for path in picture_files(tmp_path)} <= SUFFIXES


def test_a_request_that_cannot_be_met_is_refused(bundle: Path, folder: Path, tmp_path: Path) -> None:
    subject = Subject.of_bundle(str(bundle), CPU)
    for changed, message in (
        ({"images": 5}, "10 or more images"),
        ({"plans": ("dd-7",)}, "it runs dd-1, dd-2"),
        ({"captions": folder}, "conditioned on classes"),
        ({"clip": folder}, "CLIP score needs captions"),
        ({"inception": str(tmp_path / "none.pth")}, "no such file"),
    ):
        with pytest.raises(DDError, match=message):
            measure(subject, _request(folder, **changed), Mean(), tmp_path / "out")


def test_baselines_are_those_that_the_bundle_can_run(bundle: Path) -> None:
    subject = Subject.of_bundle(str(bundle), CPU)
    names = [p.name for p in subject.runnable()]
    assert names[:2] == ["dd-1", "dd-2"] and {"teacher", "skip-26", "onestep"} <= set(names)
    bare = replace(subject, sampler=replace(subject.sampler, marginals_KLV=None, student=None), plans=())
    assert [p.name for p in bare.runnable()] == ["teacher"]


def test_the_inception_score_is_that_of_the_layer_on_our_features(tmp_path: Path) -> None:
    weight, features = torch.randn(1008, 2048) / 8, torch.randn(40, 2048)
    torch.save({"fc.weight": weight, "fc.bias": torch.ones(1008)}, tmp_path / "fid.pth")
    found = Classifier(str(tmp_path / "fid.pth"))(features)
    assert torch.allclose(found, (features @ weight.T).double().softmax(1))
    assert inception_score(found)[0] > 1
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(DDError, match="torchvision's Inception is another network"):
        Classifier(str(tmp_path / "torchvision.pth"))


def test_the_papers_figures_agree_with_those_of_the_registry() -> None:
    for name in (
        "var-dd-d16",
        "var-dd-d20",
        "var-dd-d24",
        "llamagen-dd-b",
        "llamagen-dd-l",
        "llamagen-t2i-256",
    ):
        spec = find_spec(name)
        model = spec.student or spec.teacher
        assert model is not None
        paper = paper_figures(model)
        assert {p.name: p.metrics["fid"] for p in spec.presets} == {
            p.name: paper[p.name].fid for p in spec.presets
        }
    assert paper_figures(replace(find_spec("var-d16").teacher, num_classes=10)) == {}  # type: ignore[type-var]


def test_texts_are_the_captions_of_the_reference(folder: Path, tmp_path: Path) -> None:
    bundle = tiny_text_bundle(tmp_path / "bundle")
    pictures = sorted(folder.rglob("*.png"))
    for i, picture in enumerate(pictures[:24]):
        if i % 2:
            picture.with_suffix(".txt").write_text("red cat\n")
        else:
            picture.with_suffix(".json").write_text(json.dumps({"caption": "blue dog"}))
    subject = Subject.of_bundle(str(bundle), CPU)
    [row] = measure(subject, _request(folder, plans=("dd-1",)), Mean(), tmp_path / "out")
    assert (row.images, row.reference_images) == (24, 30)
    loaded = load_bundle(bundle, CPU)
    assert loaded.text is not None
    cond = loaded.text.encode(["blue dog", "red cat"])
    plan = loaded.presets[0].plan
    expected = sample_images(replace(loaded.sampler, exact=False), plan, cond, [(3, 0), (3, 1)])
    drawn = torch.from_numpy(np.load(tmp_path / "out" / "samples" / "dd-1.npz")["arr_0"][:2])
    assert (drawn.int() - expected.int()).abs().max() <= 1
    clip = tiny_clip(tmp_path / "tiny-clip")
    [scored] = measure(subject, _request(folder, plans=("dd-1",), clip=clip), Mean(), tmp_path / "scored")
    with np.load(tmp_path / "scored" / "samples" / "dd-1.npz") as samples:
        image, label = torch.from_numpy(samples["arr_0"]), torch.from_numpy(samples["arr_1"])
    fits = ClipScore(clip, ["blue dog", "red cat"] * 12, CPU)(image, label)
    assert scored.clip_score == pytest.approx(float(fits.mean()), abs=1e-4) and float(fits.mean()) > 0
    table = (tmp_path / "scored" / "evaluation.md").read_text()
    assert (
        f"{scored.clip_score:.2f}" in table
        and "by tiny-clip" in table
        and "CLIP" not in (tmp_path / "out" / "evaluation.md").read_text()
    )
    listed = tmp_path / "captions.tsv"
    listed.write_text("".join(f"{p.name}\tred cat\n" for p in pictures[:11]))
    [row] = measure(subject, _request(folder, plans=("dd-1",), captions=listed), Mean(), tmp_path / "two")
    assert row.images == 11
    listed.write_text("nothing\tred cat\n")
    with pytest.raises(DDError, match="no captions in"):
        measure(subject, _request(folder, plans=("dd-1",), captions=listed), Mean(), tmp_path / "three")
    with pytest.raises(InvalidRequestError, match="no encoder"):
        measure(replace(subject, encode=None), _request(folder, plans=()), Mean(), tmp_path / "four")


def test_the_command(
    bundle: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "FeatureExtractor", lambda *_: Mean())
    out = tmp_path / "out"
    words = ["evaluate", str(bundle), "--images", "12", "--plans", "dd-1", "--no-timing", "--out", str(out)]
    cli.app([*words, "--device", "cpu", "--reference", str(folder)], standalone_mode=False)
    assert "| dd-1 | 1 | 12 against 30 |" in capsys.readouterr().out
    with pytest.raises(DDError, match="--reference"):
        cli.app(words, standalone_mode=False)
    unknown = ["evaluate", "no-such", "--reference", str(folder), "--out", str(tmp_path / "unknown")]
    with pytest.raises(DDError, match="no-such"):
        cli.app(unknown, standalone_mode=False)
    assert not (tmp_path / "unknown").exists()
