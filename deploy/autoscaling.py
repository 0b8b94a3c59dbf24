"""How many encoder replicas there should be: what `autoscaling_config.policy` of the YAML names."""

from typing import Any

from ray.serve.config import AutoscalingContext


class BacklogPolicy:
    """As many replicas as it takes for each to have `target_seconds` of encoding before it.

    Every replica predicts the seconds from the tokens of the images it holds and from what such images have cost of
    late (`encoder_service/backlog.py`), so ten large images count as much as a hundred small ones. Serve averages the
    predictions over `look_back_period_s`, and applies delays and the smallest and largest numbers of replicas.
    """

    def __init__(self, target_seconds: float) -> None:
        if not target_seconds > 0:
            raise ValueError(f"target_seconds must be above 0, not {target_seconds}")
        self._target_seconds = target_seconds

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number, which Serve rounds up, and no state."""
        reports = context.aggregated_metrics or {}
        if "backlog_seconds" not in reports:  # replicas that have just started say nothing yet
            return context.target_num_replicas, {}
        seconds, images = (sum(reports[name].values()) for name in ("backlog_seconds", "backlog_images"))
        if images:  # those that wait for a place in a replica cost what the others do
            seconds *= 1 + context.total_queued_requests / images
        return seconds / self._target_seconds, {}
