"""Rounding one layer: error bounds, the bytes it is stored as, and the smoothing that serves it best."""

import numpy as np
import pytest

from bar_edge.calibration.observers import LEVELS, InputStats
from bar_edge.calibration.quantize import (
    STRENGTHS,
    block_size,
    choose,
    from_blocks,
    per_channel,
    quantizable,
    stored,
    to_blocks,
)

SHAPES = [(96, 256), (65, 192), (64, 80), (3, 16)]


def random_weight(out: int, in_features: int) -> np.ndarray:
    """Rows and columns of very different sizes, as trained weights have."""
    rng = np.random.default_rng((out, in_features))
    scale = np.exp(rng.uniform(-3, 3, (out, 1)) + rng.uniform(-1, 1, (1, in_features)))
    return (rng.standard_normal((out, in_features)) * scale).astype(np.float32)


def ones(weight: np.ndarray) -> np.ndarray:
    return np.ones(weight.shape[1], dtype=np.float32)


# -- per channel -------------------------------------------------------------------------------------------------------


def test_per_channel_is_off_by_half_a_level_at_most():
    for shape in SHAPES:
        weight = random_weight(*shape)
        levels, scale = per_channel(weight)
        assert levels.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == shape[:1]
        assert (np.abs(levels.astype(int)).max(axis=1) == LEVELS).all()  # symmetric, and every row uses its whole range
        error = np.abs(levels * scale[:, None].astype(np.float64) - weight)
        assert (error <= scale[:, None] * 0.5001).all()


def test_per_channel_scales_are_those_of_the_row_alone():
    weight = random_weight(8, 64)
    louder = np.concatenate((weight[:4], weight[4:] * 1000))
    np.testing.assert_array_equal(per_channel(louder)[0], per_channel(weight)[0])
    np.testing.assert_array_equal(per_channel(louder)[1][:4], per_channel(weight)[1][:4])


def test_a_row_of_zeros_stays_zero():
    weight = random_weight(4, 128)
    weight[2] = 0
    levels, scale = per_channel(weight)
    assert not levels[2].any() and (scale > 0).all()
    for bits in (8, 4):
        values, scale = to_blocks(weight, bits, ones(weight))
        assert not from_blocks(values, scale, bits)[2].any()
        assert np.isfinite(scale).all() and (scale > 0).all()


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_block_size_is_the_largest_power_of_two_that_divides_up_to_128():
    for in_features in range(1, 2000):
        block = block_size(in_features)
        assert in_features % block == 0 and block in (1, 2, 4, 8, 16, 32, 64, 128)
        assert block == 128 or in_features % (2 * block)


@pytest.mark.parametrize(("shape", "bits"), [(shape, bits) for shape in SHAPES[1:3] for bits in (8, 4)])
def test_blocks_survive_the_round_trip_within_half_a_level(shape, bits):
    weight = random_weight(*shape)
    values, scale = to_blocks(weight, bits, ones(weight))
    block = block_size(shape[1])
    assert values.dtype == np.uint8 and values.shape == (shape[0], shape[1] // block, block * bits // 8)
    assert scale.dtype == np.float32 and scale.shape == values.shape[:2]
    blocks = weight.reshape(*scale.shape, block)
    error = np.abs(from_blocks(values, scale, bits).reshape(blocks.shape) - blocks)
    largest = (1 << (bits - 1)) - 1
    inside = np.abs(blocks) <= largest * scale[..., None]
    assert (error <= scale[..., None] * 0.5001)[inside].all()
    assert bits == 4 or inside.mean() > 0.99  # 4 bits may clip a block's largest values
    peaks = np.abs(blocks).max(axis=2)
    if bits == 8:  # one scale a row, which TensorRT reads as a scale per channel
        assert (scale == scale[:, :1]).all()
        peaks = np.broadcast_to(peaks.max(axis=1, keepdims=True), peaks.shape)
    unclipped = peaks / largest
    plain = np.clip(np.rint(blocks / unclipped[..., None]), -largest - 1, largest) * unclipped[..., None]
    assert (np.square(error).sum(axis=2) <= np.square(plain - blocks).sum(axis=2) * 1.001 + 1e-12).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_that_are_levels_already_are_kept_exactly(bits):
    half = 1 << (bits - 1)
    levels = np.random.default_rng(bits).integers(1 - half, half, (7, 4, 64))
    levels[..., 0] = half - 1  # every block has its largest level
    weight = (levels * 0.25).astype(np.float32).reshape(7, 256)
    values, scale = to_blocks(weight, bits, ones(weight))
    np.testing.assert_array_equal(from_blocks(values, scale, bits), weight)


def test_two_values_a_byte_with_the_first_one_low():
    """What MatMulNBits and ONNX's UINT4 read: 8 stands for zero."""
    weight = np.zeros((1, 16), dtype=np.float32)
    weight[0, :6] = [7, -7, 1, -1, 3, 0]
    values, scale = to_blocks(weight, 4, ones(weight))
    assert scale == 1.0
    assert values[0, 0].tolist() == [0x1F, 0x79, 0x8B, *[0x88] * 5]
    values, scale = to_blocks(weight * 127 / 7, 8, ones(weight))
    assert values[0, 0, :3].tolist() == [255, 1, 146] and scale == 1.0


def test_what_the_input_uses_most_is_kept_best():
    """The scale of a block serves the output: a large weight of a channel that is always zero may be clipped."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (200, 16)).astype(np.float32)
    weight[:, 0] = 2
    mean_square = ones(weight)
    mean_square[0] = 0
    errors = {}
    for name, importance in (("even", ones(weight)), ("known", mean_square)):
        found = from_blocks(*to_blocks(weight, 4, importance), 4)
        errors[name] = float((np.square(found - weight) * mean_square).sum())
    assert errors["known"] < 0.8 * errors["even"]


def test_small_and_odd_layers_stay_as_they_are():
    large, small = [(64, 64), (64, 80), (4096, 1024)], [(63, 128), (128, 63), (512, 72), (24, 192)]
    assert all(quantizable(*shape) for shape in large) and not any(quantizable(*shape) for shape in small)


# -- the choice --------------------------------------------------------------------------------------------------------


def seen(rows: np.ndarray) -> InputStats:
    stats, rng = InputStats("some.layer", rows.shape[1]), np.random.default_rng(0)
    stats.add(rows.astype(np.float32), "tokens 1/4 conditional", rng)
    stats.flush(rng)
    return stats


@pytest.fixture
def outliers() -> np.ndarray:
    """A few channels are forty times as large as the others, as in a transformer."""
    rows = np.random.default_rng(3).standard_normal((40, 128))
    rows[:, [5, 70]] *= 40
    return rows


PRECISIONS = ("int8", "int8-weight", "int4-weight")


def test_outlier_channels_are_smoothed_where_it_is_exact(outliers):
    weight = np.random.default_rng(4).standard_normal((96, 128)).astype(np.float32)
    stats = seen(outliers)
    for precision in PRECISIONS:
        plain = choose(stats, weight, precision, "max", foldable=False)
        assert (plain.strength, plain.factors, plain.precision) == (0.0, None, precision)
        best = choose(stats, weight, precision, "max", foldable=True)
        assert best.strength in STRENGTHS[precision] and best.snr_db >= plain.snr_db
        if precision == "int8":
            assert best.strength > 0 and best.factors is not None and best.factors.shape == (128,)
            assert best.snr_db > plain.snr_db + 6
            assert best.factors[[5, 70]].min() > np.median(best.factors) * 3


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_choice_tells_the_error_of_what_is_stored(outliers, asymmetric):
    """The layer as stored, run on the rows that were seen, is as far from exact as the choice says."""
    weight = np.random.default_rng(4).standard_normal((96, 128)).astype(np.float32)
    rows = np.abs(outliers) - 0.1 if asymmetric else outliers  # as behind a SiLU
    stats = seen(rows)
    for precision in PRECISIONS:
        choice = choose(stats, weight, precision, "mse", foldable=True, asymmetric=asymmetric)
        s = np.ones(128, dtype=np.float32) if choice.factors is None else choice.factors
        tensors = stored("layer", choice, weight * s, stats.mean_square / s**2)
        x = rows.astype(np.float32) / s
        if precision == "int8":
            scale = float(np.ravel(tensors["layer.input_scale"])[-1])
            zero = int(np.ravel(tensors.get("layer.input_zero_point", 128))[-1])
            assert (zero < 64) is asymmetric
            x = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
            w = (tensors["layer.weight_int8"] * tensors["layer.weight_scale"].astype(np.float64)).T
        else:
            bits = {"int8-weight": 8, "int4-weight": 4}[precision]
            w = from_blocks(tensors[f"layer.weight_blocks{bits}"], tensors["layer.block_scale"], bits)
        exact = rows @ weight.T.astype(np.float64)
        snr = 10 * np.log10(np.square(exact).mean() / np.square(x @ w.T - exact).mean())
        assert snr == pytest.approx(choice.snr_db, abs=0.1), precision


@pytest.mark.parametrize(("sign", "zero_point"), [(1, 0), (-1, 255)])
def test_zero_is_a_level_even_of_an_input_that_is_never_zero(sign, zero_point):
    """Padding and masked rows are zero; the levels reach from there to the farthest value."""
    rows = sign * np.random.default_rng(5).uniform(3, 4, (40, 128)).astype(np.float32)
    weight = np.random.default_rng(4).standard_normal((96, 128)).astype(np.float32)
    choice = choose(seen(rows), weight, "int8", "max", foldable=False, asymmetric=True)
    assert choice.input_zero_point == zero_point
    assert choice.input_scale == pytest.approx(np.abs(rows).max() / 255)


def test_a_layer_is_stored_under_its_documented_names(outliers):
    weight = np.random.default_rng(4).standard_normal((96, 128)).astype(np.float32)
    expected = {
        "int8": {
            "weight_int8": ("int8", (128, 96)),
            "weight_scale": ("float32", (96,)),
            "input_scale": ("float32", ()),
        },
        "int8-weight": {"weight_blocks8": ("uint8", (96, 1, 128)), "block_scale": ("float32", (96, 1))},
        "int4-weight": {"weight_blocks4": ("uint8", (96, 1, 64)), "block_scale": ("float32", (96, 1))},
    }
    for precision in PRECISIONS:
        choice = choose(seen(outliers), weight, precision, "mse", foldable=False)
        found = {name: (a.dtype.name, a.shape) for name, a in stored("a.b", choice, weight, ones(weight)).items()}
        assert found == {f"a.b.{part}": value for part, value in expected[precision].items()}


def test_a_layer_that_saw_or_holds_only_zeros_can_be_quantized():
    """adaLN starts at zero, and so do layers nobody trained."""
    weight = np.random.default_rng(4).standard_normal((96, 128)).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        for precision in PRECISIONS:
            for rows, w in ((np.zeros((9, 128)), weight), (np.ones((9, 128)), weight * 0)):
                choice = choose(seen(rows), w, precision, "mse", foldable=True)
                tensors = stored("layer", choice, w, np.zeros(128, dtype=np.float32))
                assert all(np.isfinite(array).all() for array in tensors.values())
