"""The figures that decide a bundle's speed."""

import pytest

from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import weights
from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.inspection import bytes_per_token, describe_bundle, summarized


def test_bytes_per_token_of_bar_b_are_those_of_the_model_notes(places_of):
    """About 170 + 46 + 4 * 101 = 620 million weights."""
    assert bytes_per_token(places_of("bar_b"), 4) / 4e6 == pytest.approx(620, rel=0.02)


def test_every_further_pass_reads_the_heads_products_again(places_of):
    places = places_of("bar_b")
    each = bytes_per_token(places, 5) - bytes_per_token(places, 4)
    assert each / 4e6 == pytest.approx(101, rel=0.02)
    assert bytes_per_token(places, 9) - bytes_per_token(places, 8) == each


def test_what_is_read_once_per_image_is_not_read_per_token(digits):
    facts = describe_bundle(digits.bundle)
    stored = facts["weights"]["bytes"]
    once = bytes_per_token(weights.read_places(digits.bundle.path / weights.FILE_NAME), 1)
    assert 0 < facts["bytes_read_per_image_once"] < stored - once
    assert facts["bytes_read_per_token"] > once


def test_for_people_an_engines_account_is_a_sentence(patch1, tmp_path):
    facts = describe_bundle(prepack_bundle(patch1.bundle, tmp_path / "cuda"))
    account = facts["engines"]["cuda"]
    assert summarized(facts) == facts | {
        "engines": {"cuda": f"kernel family {account['family']}, fp16, layers fp16 x{len(account['layers'])}"}
    }
    account["layers"] = {"a": {"form": "fp16"}, "b": {"form": "int8"}, "c": {"form": "int8"}}
    assert summarized(facts)["engines"]["cuda"].endswith(", layers int8 x2, fp16 x1")


def test_for_people_plans_are_told_by_their_rows(patch1):
    plans = {
        "library": "tensorrt_rtx", "version": "1.7.1", "sms": [80, 120], "precision": "fp16",
        "profiles": [{"sizes": {"rows": 2}, "plans": {}}, {"sizes": {"rows": 16}, "plans": {}}],
    }  # fmt: skip
    facts = describe_bundle(patch1.bundle) | {"engines": {"tensorrt": plans}}
    assert summarized(facts)["engines"] == {"tensorrt": "tensorrt_rtx 1.7.1, SM 8.0, 12.0, fp16, plans for 2, 16 rows"}


@pytest.mark.parametrize("account", [{}, {"layers": {"a": 3}}, {"layers": []}, {"profiles": 1, "sms": []}])
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_malformed_account_of_an_engine_is_a_bundle_error(patch1, name, account):
    facts = describe_bundle(patch1.bundle) | {"engines": {name: account}}
    with pytest.raises(BundleError, match=f"the account of {name} in the manifest is malformed"):
        summarized(facts)


def test_a_bundle_that_is_not_compiled_names_its_engines(patch1):
    facts = describe_bundle(patch1.bundle)
    assert summarized(facts) == facts and facts["engines"] == ["onnxruntime"]
