"""What waits for an encoder is predicted from what images have cost."""

import numpy as np
import pytest

from encoder_service.backlog import ImageCost, Stage

SIZES = (16, 64, 256, 1225, 4096)


def seconds(num_tokens: int) -> float:
    """As a tower with full attention takes."""
    return 1e-5 * num_tokens + 2e-9 * num_tokens**2


def test_cost_of_other_sizes_is_learned_with_its_quadratic_part() -> None:
    cost = ImageCost()
    for num_tokens in SIZES[:-1] * 5:
        cost.note(num_tokens, seconds(num_tokens))
    assert [cost.predict(size) for size in SIZES] == pytest.approx([seconds(size) for size in SIZES], rel=1e-6)


def test_one_size_is_enough_for_its_own_cost_and_unknown_ones_grow_with_their_tokens() -> None:
    cost = ImageCost()
    assert cost.predict(100) == 0
    cost.note(100, 0.5)
    assert (cost.predict(100), cost.predict(300)) == pytest.approx((0.5, 1.5))


def test_noise_never_makes_a_cost_negative() -> None:
    random = np.random.default_rng(0)
    cost = ImageCost()
    for _ in range(300):
        cost.note(int(random.integers(1, 5000)), float(random.exponential(0.01)))
        assert all(cost.predict(size) >= 0 for size in (1, 100, 5000, 20000))


def test_new_speed_replaces_the_old_one() -> None:
    cost = ImageCost()
    for took in [1.0] * 50 + [0.01] * 150:
        cost.note(64, took)
    assert cost.predict(64) == pytest.approx(0.01, rel=0.1)


def test_stage_counts_what_it_holds_and_shares_it_among_its_workers() -> None:
    stage = Stage(workers=2)
    stage.note(64, 0.1)
    with stage.holding(64), stage.holding(64):
        with pytest.raises(KeyError), stage.holding(640):
            assert (stage.num_images, stage.seconds) == (3, pytest.approx(0.6))
            raise KeyError
        assert (stage.num_images, stage.seconds) == (2, pytest.approx(0.1))
    assert (stage.num_images, stage.seconds) == (0, 0)
