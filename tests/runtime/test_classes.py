"""Class names for the 1000-class models, and plain numbers for all others."""

import pytest

from bar_edge.runtime.classes import class_name, parse_class
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.spec import VARIANTS, ModelSpec

IMAGENET = VARIANTS["bar_b"].spec
DIGITS = ModelSpec.from_dict({**IMAGENET.to_dict(), "num_classes": 10})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("207", 207),
        (" 0 ", 0),
        ("golden retriever", 207),
        ("Golden  Retriever", 207),
        ("golden_retriever", 207),
        ("macaw", 88),
        ("red panda", 387),
        ("lesser panda", 387),
        ("tench", 0),
        ("toilet paper", 999),
    ],
)
def test_imagenet_classes_are_found_by_number_and_by_name(text, expected):
    assert parse_class(text, IMAGENET) == expected


def test_a_part_of_a_name_is_enough_if_only_one_class_has_it():
    assert parse_class("wallab", IMAGENET) == parse_class("wallaby", IMAGENET) == 104


def test_a_whole_name_wins_over_parts_of_others():
    assert parse_class("bee", IMAGENET) == 309  # and not beer glass, beetle, ...


@pytest.mark.parametrize("text", ["crane", "maillot", "terrier", "a", ""])
def test_an_ambiguous_name_is_refused_with_candidates(text):
    with pytest.raises(RequestError, match=r"could be \d+ classes \(\d+ .*give the number"):
        parse_class(text, IMAGENET)


def test_long_lists_of_candidates_are_cut():
    with pytest.raises(RequestError, match="…") as caught:
        parse_class("terrier", IMAGENET)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["unicorn", "digit seven", "golden retriever puppy"])
def test_an_unknown_name_is_refused(text):
    with pytest.raises(RequestError, match="no ImageNet class has that name"):
        parse_class(text, IMAGENET)


@pytest.mark.parametrize("text", ["golden retriever", "seven", ""])
def test_other_models_have_numbers_only(text):
    with pytest.raises(RequestError, match="this model has no class names; give a number 0 to 9"):
        parse_class(text, DIGITS)


@pytest.mark.parametrize("spec", [IMAGENET, DIGITS], ids=["imagenet", "digits"])
@pytest.mark.parametrize("text", ["--5", "-", "²", "٣²", "1.5", "1e3", pytest.param("9" * 5000, id="long")])
def test_what_only_looks_like_a_number_is_refused_like_a_name(text, spec):
    with pytest.raises(RequestError, match=r"^class "):
        parse_class(text, spec)


def test_every_imagenet_class_has_a_name_that_finds_it_or_is_shared():
    shared = 0
    for class_id in range(1000):
        try:
            assert parse_class(class_name(class_id, IMAGENET), IMAGENET) == class_id
        except RequestError:
            shared += 1
    assert shared < 20  # crane the bird and the machine, and the like


def test_labels():
    assert class_name(207, IMAGENET) == "golden retriever"
    assert class_name(7, DIGITS) == "7"
    assert class_name(None, IMAGENET) == class_name(None, DIGITS) == "unconditional"
