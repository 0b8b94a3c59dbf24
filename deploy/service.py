"""Starts, watches, scales and stops the application: what the command, the demo and `fovea verify` share.

Everything goes through Ray's declarative API, as `serve deploy` does, so that changing one deployment's replicas leaves
the other alone.
"""

import contextlib
import copy
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import ray
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError

from deploy import serve_settings
from deploy.private_redis import end_private_servers
from deploy.progress import waiting

APPLICATION = "fovea"
DEPLOYMENTS = ("encoder", "llm")
DEFAULT_CONFIG = Path(__file__).parent / "serve_shapes.yaml"
DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
START_TIMEOUT_S = 300.0

_POLL_S = 0.25

Report = Callable[[str], None]


class ServiceError(RuntimeError):
    """Something a user can mend; the message says how."""


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    name: str
    status: str
    num_running: int
    target: int
    message: str


def application_config(
    *,
    config: Path = DEFAULT_CONFIG,
    model: str | None = None,
    encoder_replicas: int | None = None,
    llm_replicas: int | None = None,
    redis_url: str | None = None,
    media_redis_url: str | None = None,
    port: int | None = None,
    backend: str = "split",
    json_logs: bool = False,
) -> dict[str, Any]:
    """The declarative configuration in `config`, with what was given in its place."""
    loaded: dict[str, Any] = yaml.safe_load(config.read_text())
    application = application_of(loaded)
    arguments = application.setdefault("args", {})
    if model is not None:
        arguments["model"] = {**arguments.get("model", {}), "path": _absolute_if_directory(model)}
    for field, given in (("redis_url", redis_url), ("media_redis_url", media_redis_url)):
        if given is not None:
            arguments["cache"] = {**arguments.get("cache", {}), field: given}
    if backend != "split":
        arguments["backend"] = backend
        application["deployments"] = [one for one in application["deployments"] if one["name"] != "encoder"]
    if json_logs:
        application["logging_config"] = {**application.get("logging_config", {}), "encoding": "JSON"}
    if port is not None:
        loaded.setdefault("http_options", {})["port"] = port
    for name, replicas in (("encoder", encoder_replicas), ("llm", llm_replicas)):
        if replicas is not None:
            _set_replicas(application, name, replicas)
    return loaded


def url_of(config: Mapping[str, Any]) -> str:
    """Where the application of this configuration answers, seen from this machine."""
    options = config.get("http_options", {})
    host = options.get("host", "127.0.0.1")
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{options.get('port', 8000)}"


@contextlib.contextmanager
def ray_cluster(report: Report) -> Iterator[str]:
    """The dashboard URL of the cluster at RAY_ADDRESS, or of one of our own that ends with this context."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise every start warns of a coming change
    address = os.environ.get("RAY_ADDRESS")
    report(f"connecting to Ray at {address}" if address else "starting Ray")
    with contextlib.nullcontext() if address else serve_settings.environment():
        with waiting("starting Ray"), _signals_kept():
            context = ray.init(
                address=address, include_dashboard=None if address else True, log_to_driver=False, logging_level="ERROR"
            )
        try:
            yield f"http://{context.dashboard_url}"
        finally:
            if not address:
                end_private_servers()
            ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Processes that are started here ignore Ctrl-C for good, and this one's handlers stay what they are.

    A terminal sends it to all of them, and parts of Ray's dashboard would end, by which the application is removed.
    Ray's own handler of SIGTERM ends a process on the spot.
    """
    terminate = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        if terminate is not signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)


@dataclass(frozen=True, slots=True)
class RunningService:
    """Where the application answers, and the dashboard through which it is managed."""

    url: str
    dashboard: str


@contextlib.contextmanager
def running_service(config: dict[str, Any], report: Report) -> Iterator[RunningService]:
    """Deploys the application, waits until it answers, and removes it again."""
    url = url_of(config)
    check_port(url)
    with ray_cluster(report) as dashboard:
        client = connect(dashboard)
        if APPLICATION in client.get_serve_details()["applications"]:
            raise ServiceError(f"{APPLICATION} is already running on this cluster; end it with `fovea down`")
        report("deploying")
        try:
            with waiting("starting the replicas"):
                client.deploy_applications(config)
                wait_until_ready(client, url, report)
            yield RunningService(url, dashboard)
        finally:
            with contextlib.suppress(RuntimeError):  # the cluster may be gone already
                remove(client)


def check_port(url: str) -> None:
    """Raises ServiceError if something listens there already."""
    address = httpx2.URL(url)
    with socket.socket() as probe:
        taken = probe.connect_ex((address.host, address.port or 80)) == 0
    if not taken:
        return
    with contextlib.suppress(httpx2.HTTPError, ValueError):
        if "system_fingerprint" in httpx2.get(f"{url}/health", timeout=5).json():
            raise ServiceError(f"Fovea is already serving at {url}; end it with `fovea down`, or choose another --port")
    raise ServiceError(f"port {address.port} is taken by another program; choose another with --port")


def free_port() -> int:
    """A port of this machine on which nothing listens at the moment."""
    return serve_settings.free_ports(1)[0]


def connect(dashboard: str) -> ServeSubmissionClient:
    """A client of the cluster's dashboard. Raises ServiceError if there is none."""
    try:
        return ServeSubmissionClient(dashboard)
    except AuthenticationError as exc:
        raise ServiceError(f"the Ray cluster at {dashboard} refuses this user's token (~/.ray/auth_token)") from exc
    except (ConnectionError, RuntimeError) as exc:
        raise ServiceError(f"no Ray cluster answers at {dashboard}; start the service with `fovea up`") from exc


def wait_until_ready(client: ServeSubmissionClient, url: str, report: Report) -> None:
    """Reports each change of a deployment's state until the application answers; raises ServiceError if it fails."""
    deadline = time.monotonic() + START_TIMEOUT_S
    reported: dict[str, str] = {}
    while time.monotonic() < deadline:
        details = client.get_serve_details()["applications"].get(APPLICATION, {})
        _report_replicas(details, reported, report)
        if details.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServiceError(f"the application did not start: {_reason(details)}")
        if details.get("status") == "RUNNING" and is_healthy(url):
            return
        time.sleep(_POLL_S)
    raise ServiceError(f"the application was not ready after {START_TIMEOUT_S:.0f} s")


def _report_replicas(details: Mapping[str, Any], reported: dict[str, str], report: Report) -> None:
    """Reports each deployment whose line is not the one in `reported`, and notes it there."""
    for deployment in statuses(details):
        line = f"{deployment.name}: {deployment.num_running} of {deployment.target} replicas running"
        if reported.get(deployment.name) != line:
            reported[deployment.name] = line
            report(line)


def wait_until_scaled(client: ServeSubmissionClient, name: str, replicas: int, report: Report) -> None:
    """Reports each change of one deployment's replicas until it has as many as were asked for."""
    deadline = time.monotonic() + START_TIMEOUT_S
    reported = ""
    while time.monotonic() < deadline:
        found = next(deployment for deployment in statuses(details_of(client)) if deployment.name == name)
        line = f"{name}: {found.num_running} of {found.target} replicas running"
        if line != reported:
            report(line)
            reported = line
        if found.status == "HEALTHY" and found.num_running == found.target == replicas:
            return
        time.sleep(_POLL_S)
    raise ServiceError(f"{name} did not reach its replica count within {START_TIMEOUT_S:.0f} s")


def wait_until_stopped(url: str) -> None:
    """Returns after Ctrl-C, or when the application is gone."""
    with contextlib.suppress(KeyboardInterrupt):
        while is_healthy(url):
            time.sleep(2)


def is_healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=10).status_code == 200
    except httpx2.HTTPError:
        return False


def statuses(details: Mapping[str, Any]) -> list[DeploymentStatus]:
    """The deployments of an application, as Serve's details say."""
    found = []
    for name, deployment in sorted(details.get("deployments", {}).items()):
        running = [replica for replica in deployment["replicas"] if replica["state"] == "RUNNING"]
        found.append(
            DeploymentStatus(
                name=name,
                status=deployment["status"],
                num_running=len(running),
                target=deployment["target_num_replicas"],
                message=deployment["message"],
            )
        )
    return found


def details_of(client: ServeSubmissionClient) -> dict[str, Any]:
    """Serve's details of the application. Raises ServiceError if it is not deployed."""
    details: dict[str, Any] | None = client.get_serve_details()["applications"].get(APPLICATION)
    if details is None:
        raise ServiceError("Fovea is not running; start it with `fovea up`")
    return details


def scale(client: ServeSubmissionClient, deployment: str, replicas: int) -> None:
    """Deploys the running configuration again with another replica count for one deployment."""
    if deployment not in DEPLOYMENTS:
        raise ServiceError(f"there is no deployment {deployment!r}; there are {', '.join(DEPLOYMENTS)}")
    if replicas < 1:
        raise ServiceError(f"replicas must be at least 1, not {replicas}")
    details_of(client)
    config = _deployed(client)
    _set_replicas(application_of(config), deployment, replicas)
    client.deploy_applications(config)


def changed(client: ServeSubmissionClient, settings: Sequence[str], config: Path | None = None) -> dict[str, Any]:
    """The deployed configuration, or that of a file, with `engine.max_num_seqs=16` and the like applied to `args:`."""
    details_of(client)
    found = _deployed(client)
    if config is not None:
        others = [one for one in found["applications"] if one["name"] != APPLICATION]
        found["applications"] = [*others, application_of(yaml.safe_load(config.read_text()))]
    for setting in settings:
        path, equals, value = setting.partition("=")
        *sections, name = path.split(".")
        if not equals or not name:
            raise ServiceError(f"a setting is written as engine.max_num_seqs=16, not {setting!r}")
        section = application_of(found).setdefault("args", {})
        for step in sections:
            section = section.setdefault(step, {})
        section[name] = yaml.safe_load(value)
    return found


def update(client: ServeSubmissionClient, config: dict[str, Any], report: Report) -> None:
    """Rolls out a configuration while requests are answered. Raises ServiceError if it does not start.

    The old replicas go on serving until the new ones are healthy, if `max_surge_percent` allows for both.
    """
    before = details_of(client)["last_deployed_time_s"]
    client.deploy_applications(config)
    deadline = time.monotonic() + START_TIMEOUT_S
    reported: dict[str, str] = {}
    while time.monotonic() < deadline:
        details = details_of(client)
        if details["last_deployed_time_s"] > before:
            _report_replicas(details, reported, report)
            if details["status"] == "DEPLOY_FAILED":
                raise ServiceError(f"the change did not start, what ran before goes on: {_reason(details)}")
            if details["status"] == "RUNNING":
                return
        time.sleep(_POLL_S)
    raise ServiceError(f"the change was not rolled out after {START_TIMEOUT_S:.0f} s")


def remove(client: ServeSubmissionClient) -> None:
    """Ends the application, if it is there; other applications of the cluster stay."""
    if APPLICATION not in client.get_serve_details()["applications"]:
        return
    config = _deployed(client)
    config["applications"] = [found for found in config["applications"] if found["name"] != APPLICATION]
    if config["applications"]:
        client.deploy_applications(config)
    else:
        client.delete_applications()


def _deployed(client: ServeSubmissionClient) -> dict[str, Any]:
    """The declarative configuration that is deployed now."""
    details = client.get_serve_details()
    applications = [
        copy.deepcopy(application["deployed_app_config"])
        for application in details["applications"].values()
        if application["deployed_app_config"] is not None
    ]
    return {
        "proxy_location": details["proxy_location"],
        "http_options": details["http_options"],
        "applications": applications,
    }


def application_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fovea's part of a Serve configuration. Raises ServiceError if it has none."""
    for application in config["applications"]:
        if application["name"] == APPLICATION:
            assert isinstance(application, dict)
            return application
    raise ServiceError(f"the configuration has no application named {APPLICATION!r}")


def _deployment(application: dict[str, Any], name: str) -> dict[str, Any]:
    deployments: list[dict[str, Any]] = application.setdefault("deployments", [])
    for deployment in deployments:
        if deployment["name"] == name:
            return deployment
    deployments.append({"name": name})
    return deployments[-1]


def _set_replicas(application: dict[str, Any], name: str, replicas: int) -> None:
    """A fixed number; Serve accepts none beside autoscaling."""
    deployment = _deployment(application, name)
    deployment.pop("autoscaling_config", None)
    deployment["num_replicas"] = replicas


def _absolute_if_directory(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _reason(details: Mapping[str, Any]) -> str:
    """The last line of the error that a replica or the builder gave, without the traceback above it."""
    messages = [details.get("message", ""), *(deployment.message for deployment in statuses(details))]
    lines = [line.strip() for message in messages for line in message.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
