"""Class names as people type them, on ImageNet's thousand."""

from __future__ import annotations

import pytest

from dd_core.hub.registry import imagenet_classes
from server.errors import BadRequestError
from server.models.labels import LabelTable
from tests.tiny import CLASSES

TABLE = LabelTable.of(imagenet_classes())


@pytest.mark.parametrize(
    ("label", "index"),
    [
        (0, 0),
        ("tench, Tinca tinca", 0),
        ("Tinca tinca", 0),
        (" GOLDEN retriever ", 207),
        ("panda bear", 388),
        ("toilet paper", 999),
        # The whole name of one class, and part of another's ("projectile, missile").
        ("missile", 657),
        ("maillot", 638),
        ("maillot, tank suit", 639),
    ],
)
def test_a_class_goes_by_index_whole_name_or_any_name_of_its_own(label: int | str, index: int) -> None:
    assert TABLE.find(label) == index


def test_every_class_answers_to_its_listed_name_but_the_two_cranes() -> None:
    """What GET /models lists, can be sent; where the data set itself is ambiguous, an index is asked for."""
    refused = []
    for index, name in enumerate(imagenet_classes()):
        try:
            assert TABLE.find(name) == index
        except BadRequestError:
            refused.append(index)
    assert refused == [134, 517]


@pytest.mark.parametrize(
    ("label", "candidates"),
    [
        ("crane", ["134 (crane)", "517 (crane)"]),
        ("Crayfish", ["123 (", "124 ("]),
        ("panda", ["387 (", "388 ("]),
    ],
)
def test_a_name_of_several_classes_is_refused_with_the_candidates(label: str, candidates: list[str]) -> None:
    with pytest.raises(BadRequestError, match="send an index") as caught:
        TABLE.find(label)
    assert caught.value.param == "label"
    assert all(part in caught.value.message for part in candidates)


@pytest.mark.parametrize("label", ["gold retriever", "", ",", 1000, -1, "x" * 10_000])
def test_an_unknown_class_is_refused_briefly(label: int | str) -> None:
    with pytest.raises(BadRequestError, match="0 to 999") as caught:
        TABLE.find(label)
    assert len(caught.value.message) < 300
    if label == "gold retriever":
        assert "golden retriever" in caught.value.message


def test_few_classes_are_listed_in_a_refusal() -> None:
    with pytest.raises(BadRequestError, match="airplane, automobile"):
        LabelTable.of(CLASSES).find("shop")
