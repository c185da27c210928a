"""The distance is that of two Gaussians, and the judge knows a digit when it sees one."""

import numpy as np
import pytest

from bar_edge.calibration.frechet import frechet_distance, judge, statistics
from bar_edge.export import demo


def test_the_distance_of_two_gaussians_is_the_known_one():
    """Independent channels: the sum of squared differences of means and of standard deviations."""
    rng = np.random.default_rng(0)
    means, deviations = rng.standard_normal((2, 12)), rng.uniform(0.1, 3, (2, 12))
    expected = np.square(np.diff(means, axis=0)).sum() + np.square(np.diff(deviations, axis=0)).sum()
    a, b = ((mean, np.diag(deviation**2)) for mean, deviation in zip(means, deviations, strict=True))
    assert frechet_distance(*a, *b) == pytest.approx(expected)
    assert frechet_distance(*b, *a) == pytest.approx(expected)
    turn, _ = np.linalg.qr(rng.standard_normal((12, 12)))  # the distance knows no axes
    turned = [(turn @ mean, turn @ covariance @ turn.T) for mean, covariance in (a, b)]
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(expected)


def test_the_covariance_is_that_of_a_sample():
    """Divided by n - 1, as evaluators do."""
    mean, covariance = statistics(np.array([[0, 5], [2, 1], [4, 3]], dtype=np.float32))
    np.testing.assert_allclose(mean, [2, 3])
    np.testing.assert_allclose(covariance, [[4, -2], [-2, 4]])


def test_a_set_has_no_distance_to_itself_and_a_small_one_to_its_like():
    features = np.random.default_rng(1).standard_normal((4000, 6)).astype(np.float32)
    everything, half, other = (statistics(part) for part in (features, features[::2], features[1::2]))
    assert frechet_distance(*everything, *everything) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(*half, *other) < 0.05 < frechet_distance(*half, other[0] + 1, other[1])


def test_the_judge_takes_drawn_digits_for_what_was_asked_for_and_nothing_else(digits):
    classes = np.arange(80) % 10
    drawn = np.stack([np.asarray(image) for image in digits.runtime.generate(list(classes), seed=3, batch_size=20)])
    noise = np.random.default_rng(0).integers(0, 256, drawn.shape).astype(np.uint8)
    with demo.data() as folder:
        right, mixed, none = (
            judge(pixels, asked, folder)
            for pixels, asked in ((drawn, classes), (drawn, classes[::-1]), (noise, classes))
        )
    assert right.images == 80 and right.accuracy > 0.85 and mixed.accuracy < 0.3 and none.accuracy < 0.5
    assert right.frechet == mixed.frechet < none.frechet / 3
