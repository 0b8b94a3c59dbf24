"""How many encoder replicas Serve is told to run, by what they predict."""

from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deploy.autoscaling import BacklogPolicy


def context(replicas: dict[str, tuple[float, float]], queued_at_handles: float = 0.0, target: int = 2) -> Any:
    """`replicas` have so many images, of so many seconds."""
    reports: dict[str, Any] = {
        "backlog_images": {name: images for name, (images, _) in replicas.items()},
        "backlog_seconds": {name: seconds for name, (_, seconds) in replicas.items()},
    }
    return AutoscalingContext(
        deployment_id=None, deployment_name="encoder", app_name="fovea", current_num_replicas=len(replicas),
        target_num_replicas=target, running_replicas=[], total_num_requests=0.0,
        total_queued_requests=queued_at_handles, aggregated_metrics=reports if replicas else {}, raw_metrics={},
        capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=8, policy_state={}, last_scale_up_time=None,
        last_scale_down_time=None, current_time=None, config=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [({"a": (10, 1.0)}, 0.5), ({"a": (2, 6.0), "b": (100, 2.0)}, 4.0), ({"a": (0, 0.0), "b": (0, 0.0)}, 0.0)],
)
def test_replicas_share_the_predicted_seconds(replicas: dict[str, tuple[float, float]], expected: float) -> None:
    assert BacklogPolicy(target_seconds=2.0)(context(replicas)) == (expected, {})


def test_images_that_wait_outside_cost_what_those_inside_do() -> None:
    assert BacklogPolicy(target_seconds=1.0)(context({"a": (50, 1.0)}, queued_at_handles=150))[0] == pytest.approx(4.0)


def test_without_a_report_the_number_stays() -> None:
    assert BacklogPolicy(target_seconds=1.0)(context({}, target=3)) == (3, {})


def test_serve_takes_the_policy_from_its_path_and_arguments() -> None:
    config = AutoscalingConfig(
        policy={"policy_function": "deploy.autoscaling:BacklogPolicy", "policy_kwargs": {"target_seconds": 2}}
    )
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context({"a": (4, 4.0)}))[0] == 2
    with pytest.raises(ValueError, match="above 0"):
        BacklogPolicy(target_seconds=0)
