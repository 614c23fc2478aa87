"""The order of the stages, and lists that give none."""

import pytest

from iirsnn.errors import UsageError
from iirsnn.train.stage_order import Stage, stages


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ([1], [("T1", 1, "ann")]),
        ([7], [("T7", 7, "ann")]),
        ((5, 3, 1), [("T5", 5, "ann"), ("T3", 3, "T5"), ("T1", 1, "T3")]),
        (
            range(5, 0, -1),
            [
                *[("T5", 5, "ann"), ("T4", 4, "T5"), ("T3", 3, "T4")],
                *[("T2", 2, "T3"), ("T1", 1, "T2")],
            ],
        ),
        ([100, 2], [("T100", 100, "ann"), ("T2", 2, "T100")]),
    ],
)
def test_each_stage_starts_from_the_one_before(timesteps, expected):
    assert stages(timesteps) == [Stage("ann"), *(Stage(*stage) for stage in expected)]


@pytest.mark.parametrize("timesteps", [[], [0], [5, 0], [2, 1, -1], [-3]])
def test_timesteps_below_one(timesteps):
    with pytest.raises(UsageError, match="timesteps: expected each T to be at least 1, got"):
        stages(timesteps)


@pytest.mark.parametrize("timesteps", [[1, 2], [5, 5, 1], [5, 3, 4, 1], [3, 2, 2]])
def test_lists_that_do_not_decrease(timesteps):
    with pytest.raises(UsageError, match="timesteps: expected a strictly decreasing list, got"):
        stages(timesteps)
