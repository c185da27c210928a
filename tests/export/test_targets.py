"""What a target is built with, and where."""

import re
from dataclasses import replace

import pytest

from bar_edge.export.targets import DEVICES, NAMES, RTX_SMS, Target, check_compilable, resolve
from bar_edge.runtime.engines.cuda.compiler import KERNELS
from bar_edge.runtime.engines.cuda.loop import MAX_BITS
from bar_edge.runtime.engines.tensorrt import RTX_CAPABILITIES
from bar_edge.runtime.errors import CompatibilityError, EngineError

BUILT_ON_THEMSELVES = ("orin", "h100", "h200", "b200", "thor")


def test_rtx_is_four_generations_and_needs_no_gpu():
    assert resolve("rtx", None) == resolve("rtx", 87) == Target("tensorrt_rtx", (80, 86, 89, 120))


@pytest.mark.parametrize(
    ("sm", "library"), [(75, "tensorrt_rtx"), (86, "tensorrt_rtx"), (121, "tensorrt_rtx"), (87, "tensorrt"),
                        (90, "tensorrt"), (110, "tensorrt"), (72, "tensorrt")],
)  # fmt: skip
def test_host_is_the_gpu_in_the_machine(sm, library):
    assert resolve("host", sm) == Target(library, (sm,))


@pytest.mark.parametrize("name", sorted(set(DEVICES) - set(BUILT_ON_THEMSELVES)))
def test_an_rtx_device_is_built_for_anywhere(name):
    """Also beside another GPU."""
    assert resolve(name, None) == resolve(name, 90) == Target("tensorrt_rtx", (DEVICES[name].sm,))


@pytest.mark.parametrize("name", BUILT_ON_THEMSELVES)
def test_other_devices_are_built_for_on_themselves(name):
    sm = DEVICES[name].sm
    assert resolve(name, sm) == resolve("host", sm) == Target("tensorrt", (sm,))


@pytest.mark.parametrize("name", BUILT_ON_THEMSELVES)
@pytest.mark.parametrize(("host_sm", "found"), [(None, "this one has no GPU"), (86, "this one has SM 8.6")])
def test_another_machine_is_told_what_it_lacks_and_to_build_on_the_device(name, host_sm, found):
    device = DEVICES[name]
    with pytest.raises(EngineError) as refused:
        resolve(name, host_sm)
    said = str(refused.value)
    assert said.startswith(f"target {name}: the {device.title} is SM {device.sm / 10:.1f}")
    assert found in said and "bar-edge compile BUNDLE --target host -o OUTPUT" in said


def test_host_without_a_gpu_says_what_builds_without_one():
    with pytest.raises(EngineError, match=r"no NVIDIA GPU answers here; .*`rtx`, which builds without a GPU"):
        resolve("host", None)


@pytest.mark.parametrize("name", ["rtx2080", "RTX", "", "sm87"])
def test_an_unknown_target_is_told_all_that_are_known(name):
    with pytest.raises(EngineError, match=re.escape(f"unknown target {name!r}; known: {', '.join(NAMES)}")):
        resolve(name, 86)


def test_the_library_runs_on_all_that_it_is_asked_to_build_for():
    assert set(RTX_SMS) <= set(RTX_CAPABILITIES)
    assert not {DEVICES[name].sm for name in BUILT_ON_THEMSELVES} & set(RTX_CAPABILITIES)


@pytest.mark.parametrize(("bits", "fits"), [(MAX_BITS, True), (MAX_BITS + 1, False)])
def test_tokens_of_more_bits_than_the_kernels_draw_are_refused(patch1, bits, fits):
    bundle = replace(patch1.bundle, spec=replace(patch1.spec, token_size=bits, patch_size=1))
    if fits:
        check_compilable(bundle)
        return
    with pytest.raises(CompatibilityError, match="tokens of this model have 257 bits, GPU engines draw 256 at most"):
        check_compilable(bundle)


def test_the_kernels_have_room_for_as_many_bits():
    assert f"MAX_BITS = {MAX_BITS};" in KERNELS.read_text()
