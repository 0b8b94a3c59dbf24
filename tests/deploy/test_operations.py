"""The files that operators take: they are what Serve, KubeRay, Compose and Grafana read, and agree with each other."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private import constants
from ray.serve.schema import ServeDeploySchema

from common import metrics
from deploy import configuration, serve_settings, service
from llm_service.deployment import EncoderHandle

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = ["serve.yaml", "serve_shapes.yaml", "serve_one_gpu.yaml", "serve_cpu_encoders.yaml"]


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture
def rayservice() -> Any:
    return load("rayservice.yaml")


@pytest.mark.parametrize("file", FILES)
def test_serve_and_fovea_accept_the_file(file: str) -> None:
    ServeDeploySchema.model_validate(load(file))
    configuration.checked(load(file))


@pytest.mark.parametrize("file", FILES)
def test_encoder_that_goes_answers_what_it_holds_and_one_that_is_lost_is_noticed_soon(file: str) -> None:
    encoder, _ = service.application_of(load(file))["deployments"]
    assert encoder["graceful_shutdown_timeout_s"] >= EncoderHandle.TIMEOUT_S
    assert encoder["health_check_period_s"] <= 2


def test_halves_that_share_a_gpu_fit_on_it() -> None:
    encoder, llm = service.application_of(load("serve_one_gpu.yaml"))["deployments"]
    shares = [one["num_replicas"] * one["ray_actor_options"]["num_gpus"] for one in (encoder, llm)]
    assert sum(shares) == pytest.approx(1) and encoder["num_replicas"] > llm["num_replicas"]
    assert configuration.checked(load("serve_one_gpu.yaml")).engine.gpu_memory_utilization == 0.6


def test_cpu_encoders_leave_the_gpu_to_the_decoder() -> None:
    config = configuration.checked(load("serve_cpu_encoders.yaml"))
    encoder, llm = service.application_of(load("serve_cpu_encoders.yaml"))["deployments"]
    assert (config.encoder.device, config.model.device) == ("cpu", "auto")
    assert ("num_gpus" in encoder["ray_actor_options"], llm["ray_actor_options"]["num_gpus"]) == (False, 1)


@pytest.mark.parametrize("file", FILES[:2])
def test_new_version_starts_before_the_old_one_stops(file: str) -> None:
    deployments = service.application_of(load(file))["deployments"]
    assert {one["name"]: one["max_surge_percent"] for one in deployments} == {"encoder": 100, "llm": 100}


def test_production_scales_each_half_by_its_load_on_gpus() -> None:
    for deployment in service.application_of(load("serve.yaml"))["deployments"]:
        assert deployment["autoscaling_config"]["max_replicas"] > deployment["autoscaling_config"]["min_replicas"]
        assert deployment["ray_actor_options"]["num_gpus"] == 1


def test_fixed_number_of_replicas_takes_the_place_of_autoscaling() -> None:
    config = service.application_config(config=DEPLOY / "serve.yaml", encoder_replicas=3)
    encoder, llm = service.application_of(config)["deployments"]
    assert encoder["num_replicas"] == 3 and "autoscaling_config" not in encoder and "autoscaling_config" in llm
    ServeDeploySchema.model_validate(config)


def test_logs_are_json_where_asked_for() -> None:
    application = service.application_of(service.application_config(json_logs=True))
    assert application["logging_config"]["encoding"] == "JSON"
    assert service.application_of(load("serve.yaml"))["logging_config"]["encoding"] == "JSON"


def test_rayservice_deploys_the_production_file(rayservice: Any) -> None:
    assert yaml.safe_load(rayservice["spec"]["serveConfigV2"]) == load("serve.yaml")


def test_rayservice_has_what_kuberay_requires(rayservice: Any) -> None:
    assert (rayservice["apiVersion"], rayservice["kind"]) == ("ray.io/v1", "RayService")
    cluster = rayservice["spec"]["rayClusterConfig"]
    assert re.search(
        rf'"ray\[serve\]>={cluster["rayVersion"].rpartition(".")[0]},', (ROOT / "pyproject.toml").read_text()
    )
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {load("compose.yaml")["services"]["fovea"]["image"]}
    gpus = [
        container["resources"]["limits"].get("nvidia.com/gpu")
        for group in cluster["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    ]
    assert gpus == ["1"]


def test_compose_has_the_redis_servers_that_the_production_file_names() -> None:
    services = load("compose.yaml")["services"]
    cache = service.application_of(load("serve.yaml"))["args"]["cache"]
    for field in ("redis_url", "media_redis_url"):
        host = re.fullmatch(r"redis://fovea:FOVEA_PASSWORD@([a-z-]+):6379/0", cache[field])
        assert host is not None and host[1] in services["fovea"]["depends_on"]
        [source] = [mount.split(":")[0] for mount in services[host[1]]["volumes"] if mount.endswith(":ro")]
        assert ">FOVEA_PASSWORD" in (DEPLOY / source).read_text()
    used = {mount.split(":")[0] for one in services.values() for mount in one["volumes"] if not mount.startswith(".")}
    assert used == load("compose.yaml")["volumes"].keys()
    assert (DEPLOY / services["fovea"]["build"]["context"] / services["fovea"]["build"]["dockerfile"]).exists()


def test_dockerfile_copies_what_is_there_and_starts_the_production_file() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    assert {words[0] for words in instructions} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "CMD"}
    copied = {source for words in instructions if words[0] == "COPY" for source in words[1:-1]}
    assert all((ROOT / source).exists() for source in copied)
    assert {"common", "encoder_service", "llm_service", "deploy"} <= copied
    command = json.loads(" ".join(next(words[1:] for words in instructions if words[0] == "CMD")))
    assert command[:2] == ["fovea", "up"] and (ROOT / command[3].removeprefix("/opt/fovea/")).exists()


def test_image_starts_ray_with_the_settings_of_fovea_up() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    (words,) = [line.split()[1:] for line in lines if line.startswith("ENV ")]
    assert dict(word.split("=") for word in words) == serve_settings.SETTINGS


def test_settings_of_serve_are_known_to_it() -> None:
    source = Path(constants.__file__).read_text()
    with serve_settings.environment():
        names = [name for name in os.environ if name.startswith("RAY_SERVE_")]
    assert set(serve_settings.SETTINGS) < set(names)
    assert [name for name in names if f'"{name}"' not in source] == []


def test_settings_leave_what_the_user_has_set_and_end_with_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    before = dict(os.environ)
    with serve_settings.environment():
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
        assert os.environ["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"
        directory = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert directory.stat().st_mode & 0o777 == 0o700
    assert dict(os.environ) == before
    assert not directory.exists()


def test_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = {name for text in expressions for name in re.findall(r"\bray_(fovea_\w+)", text)}
    assert len(shown) > 20
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} <= set(metrics.names())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)


def test_dashboard_has_a_panel_beside_each_other_and_none_above_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((DEPLOY / "grafana.json").read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken
        taken |= cells
