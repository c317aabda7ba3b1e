"""Folders of images: what is read, cropped, split, cached and refused."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.helpers import draw_folder
from training.data import folders
from training.data.folders import FolderImages, load_folder
from training.data.packages import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "photos", {"class 10": 24, "class 2": 30})


def test_classes_have_the_folders_names_in_natural_order(photos: Path) -> None:
    (photos / ".thumbnails").mkdir()
    found = load_folder(photos, 64)
    assert found.classes == ("class 2", "class 10")
    for images, counts in ((found.train, [18, 15]), (found.test, [12, 9])):
        assert images.labels.bincount().tolist() == counts, "20 in all, of each class its share"
        assert images.images.shape == (sum(counts), 3, 64, 64) and images.images.dtype == torch.uint8


def test_pixels_are_those_of_the_files(photos: Path) -> None:
    found = load_folder(photos, 64)
    known = {
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(): label
        for label, name in enumerate(found.classes)
        for path in (photos / name).iterdir()
    }
    for images in (found.train, found.test):
        for pixels, label in zip(images.images, images.labels.tolist(), strict=True):
            assert known.pop(pixels.numpy().tobytes()) == label
    assert not known, "every image is in one of the two, and once"


def test_a_tenth_is_held_out_by_content_whatever_the_files_are_called(tmp_path: Path) -> None:
    def held(images: FolderImages) -> set[bytes]:
        return {each.numpy().tobytes() for each in images.test.images}

    first = load_folder(draw_folder(tmp_path / "one", {"a": 110, "b": 101}), 32)
    assert first.test.labels.bincount().tolist() == [11, 11]
    for path in list((tmp_path / "one").rglob("*.png")):
        path.rename(path.with_name(f"{1000 - int(path.stem)}.png"))
    renamed = load_folder(tmp_path / "one", 32)
    assert held(renamed) == held(first) and renamed.digest == first.digest


def test_other_shapes_are_cropped_in_the_middle_and_resized_without_aliasing(tmp_path: Path) -> None:
    draw_folder(tmp_path / "wide", {"a": 20, "b": 20}, (96, 64))
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the small picture can show: grey, where sampling would alias
    stripes[:, :32] = stripes[:, 96:] = (255, 0, 0)  # cut away
    Image.fromarray(stripes).save(tmp_path / "wide" / "a" / "stripes.png")
    found = load_folder(tmp_path / "wide", 32)
    pixels = torch.cat([found.train.images, found.test.images]).float()
    middle = pixels[:, :, 8:24, 8:24]
    assert ((middle - 127.5).abs() < 12).all((1, 2, 3)).sum() == 1
    assert not ((pixels[:, 0] > 200) & (pixels[:, 1] < 50)).all((1, 2)).any()


def test_pictures_are_upright_and_white_where_they_are_transparent(photos: Path) -> None:
    turned = Image.new("RGB", (64, 64), "black")
    turned.paste((255, 255, 255), (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(photos / "class 2" / "turned.png", exif=exif)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(photos / "class 2" / "clear.png")
    found = load_folder(photos, 64)
    pixels = torch.cat([found.train.images, found.test.images])
    assert (pixels == 255).all(3).all(2).all(1).sum() == 1
    below = (pixels[:, :, :32] == 0).flatten(1).all(1) & (pixels[:, :, 32:] == 255).flatten(1).all(1)
    assert below.sum() == 1


def test_corrupt_files_are_left_out_and_counted_in_one_line(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (photos / "class 2" / "0.png").read_bytes()
    (photos / "class 2" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "class 2" / "text.jpg").write_text("no picture")
    (photos / "class 2" / "empty.webp").touch()
    (photos / "class 2" / "gone.png").symlink_to("nowhere.png")
    (photos / "class 2" / "notes.txt").write_text("is not looked at")
    Image.new("I;16", (64, 64), 40_000).save(photos / "class 2" / "deep.png")
    with caplog.at_level(logging.INFO, logger="dd_train"):
        found = load_folder(photos, 64)
        again = load_folder(photos, 64)
    assert len(found.train.labels) + len(found.test.labels) == 54
    assert again.digest == found.digest
    [line, same] = [record.message for record in caplog.records if "of 2 classes" in record.message]
    assert "5 could not be read and are left out (first " in line and line == same


def _spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    decode = folders._decode

    def spy(file: folders._File, size: int) -> object:
        seen.append(file.path.name)
        return decode(file, size)

    monkeypatch.setattr(folders, "_decode", spy)
    return seen


def test_images_are_decoded_once(photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _spied(monkeypatch)
    first = load_folder(photos, 64)
    again = load_folder(photos, 64)
    assert len(seen) == 54
    assert torch.equal(first.train.images, again.train.images) and torch.equal(
        first.test.labels, again.test.labels
    )
    load_folder(photos, 32)
    assert len(seen) == 108, "another size is another cache"
    assert len(list((cache / "folders").glob("*/index.safetensors"))) == 2


def test_a_change_is_noticed_and_takes_the_place_of_the_old_cache(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = load_folder(photos, 64).digest
    seen = _spied(monkeypatch)
    path = photos / "class 2" / "3.png"
    os.utime(path, (1, 1))
    assert load_folder(photos, 64).digest == digest and len(seen) == 54, "the same pictures at another time"
    shutil.copy(photos / "class 10" / "3.png", path)
    changed = load_folder(photos, 64)
    assert changed.digest != digest
    (photos / "class 2").rename(photos / "class 3")
    assert load_folder(photos, 64).digest not in (digest, changed.digest)
    assert len(list((cache / "folders").glob("*/index.safetensors"))) == 1


def test_what_a_kill_left_is_not_taken(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folders, "save_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_folder(photos, 64)
    assert len(load_folder(photos, 64).test.labels) == 21


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({}, "has no sub-folders: a class is a sub-folder"),
        ({"cat": 50}, "has one sub-folder, 'cat': a class is"),
        ({"cat": 50, "dog": 0}, "dog holds no images"),
        ({"cat": 0, "dog": 0}, "cat holds no images"),
        ({"cat": 50, "dog": 1}, "dog has 1 images that can be read; a class needs"),
        ({"cat": 20, "dog": 19}, "has 39 images that can be read, and 40 are needed"),
        ({"train": 50, "val": 50}, "is split into train, val: name the folder of the classes"),
        ({"cat": 50, "d\nog": 50}, r"whose name cannot be printed: 'd\\nog'"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused_in_one_line(
    counts: dict[str, int], says: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=says) as caught:
        load_folder(draw_folder(tmp_path / "photos", counts), 32)
    assert "\n" not in caught.value.message and caught.value.param == "data"


def test_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "nothing"):
        with pytest.raises(DataError, match="is no folder"):
            load_folder(tmp_path / name, 32)


def test_a_class_whose_images_cannot_be_read_is_refused(photos: Path) -> None:
    for path in (photos / "class 10").iterdir():
        path.write_text("no picture")
    with pytest.raises(
        DataError, match=r"class 10 has 0 images that can be read, 24 cannot \(.*: no image\)"
    ):
        load_folder(photos, 64)


def test_images_smaller_than_the_size_are_counted_and_refused(photos: Path) -> None:
    Image.new("RGB", (80, 47)).save(photos / "class 2" / "small.png")
    with pytest.raises(DataError, match=r"1 of the 55 images .* smaller than 48 pixels, .*small\.png: 80×47"):
        load_folder(photos, 48)
    assert len(load_folder(photos, 47).train.labels) == 55 - 21
