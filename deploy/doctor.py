"""`fovea doctor`: what Fovea needs of this machine, and how to mend what is wrong."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import redis
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from common.checkpoint import checkpoint_directory, load_config
from common.config import ModelConfig
from common.local_redis import find_redis_server
from deploy import configuration, service
from deploy.app import AppConfig, resolve_model

Level = Literal["ok", "note", "wrong"]

MIN_PYTHON = (3, 11)
GIB = 1024**3

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}
_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A `note` is worth knowing and stops nothing; what is `wrong` keeps Fovea from working as configured."""

    subject: str
    level: Level
    found: str
    fix: str = ""


def run(config: Mapping[str, Any]) -> bool:
    """Prints all findings; whether nothing is wrong."""
    args = configuration.checked(config)
    console = Console(width=max(Console().width, 100))
    with console.status("looking"):
        findings = list(examine(config, args))
    table = Table(show_edge=False)
    for column in ("", "", "found", "fix"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        level = f"[{_STYLES[finding.level]}]{finding.level}[/]"
        table.add_row(finding.subject, level, finding.found, finding.fix)
    console.print(table)
    num_wrong = sum(finding.level == "wrong" for finding in findings)
    print(f"{num_wrong} of {len(findings)} are wrong" if num_wrong else "nothing is wrong; start with `fovea up`")
    return not num_wrong


def examine(config: Mapping[str, Any], args: AppConfig) -> Iterator[Finding]:
    yield python()
    yield packages()
    yield processor(args.model)
    yield graphics(args.model)
    yield memory()
    yield ray_cluster()
    for role, url in (("redis_url", args.cache.redis_url), ("media_redis_url", args.cache.media_redis_url)):
        yield private_redis(role) if url is None else configured_redis(role, url)
    yield serving_port(service.url_of(config))
    yield model(args.model)


def python() -> Finding:
    found = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return Finding("Python", "wrong", found, f"install Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    if not sys.platform.startswith("linux"):
        return Finding("Python", "wrong", f"{found} on {sys.platform}", "Fovea runs on Linux")
    return Finding("Python", "ok", found)


def packages() -> Finding:
    """Whether the installed versions are those that Fovea was made for."""
    unfit = []
    try:
        wanted = [Requirement(line) for line in requires("fovea") or ()]
    except PackageNotFoundError:
        return Finding("packages", "note", "Fovea itself is not installed", "pip install -e .")
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            unfit.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            unfit.append(f"{requirement.name} {found}, not {requirement.specifier}")
    if unfit:
        return Finding("packages", "wrong", ", ".join(unfit), "pip install -e .")
    return Finding("packages", "ok", f"torch {torch.__version__}, Ray {version('ray')}")


def processor(model: ModelConfig) -> Finding:
    cores = len(os.sched_getaffinity(0))
    found = f"{cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    if model.num_threads > cores:
        return Finding("CPU", "note", found, f"model.num_threads is {model.num_threads}: more than there are cores")
    return Finding("CPU", "ok", found)


def graphics(model: ModelConfig) -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", ", ".join(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in names))
    if model.device == "cuda":
        fix = "set model.device to auto or cpu, or give this machine a GPU that `nvidia-smi` lists"
        return Finding("GPU", "wrong", "none that torch can use", fix)
    if shutil.which("nvidia-smi") is not None:
        fix = f"torch {torch.__version__} and the driver do not fit: see `nvidia-smi` and install a torch for that CUDA"
        return Finding("GPU", "note", "a driver, but none that torch can use", fix)
    return Finding("GPU", "ok", "none: on CPU, in float32")


def memory() -> Finding:
    """Ray keeps its objects in /dev/shm and starts on disk without it."""
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    found = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < GIB // 4:
        return Finding("shared memory", "note", found, "in a container, start it with --shm-size=2g")
    return Finding("shared memory", "ok", found)


def ray_cluster() -> Finding:
    """A local cluster is started by `fovea up`, so none is needed."""
    try:
        client = service.connect(service.DEFAULT_DASHBOARD)
        details = client.get_serve_details()
    except service.ServiceError as exc:
        if "token" in str(exc):
            return Finding("Ray", "note", str(exc), "`fovea up` starts one of its own beside it")
        return Finding("Ray", "ok", "no cluster runs here; `fovea up` starts one")
    running = ", ".join(details["applications"]) or "no application"
    return Finding("Ray", "ok", f"a cluster at {service.DEFAULT_DASHBOARD} with {running}")


def private_redis(role: str) -> Finding:
    server = find_redis_server()
    if server is None:
        fix = f"apt-get install redis-server, or set cache.{role}"
        return Finding(f"cache.{role}", "note", "no redis-server: embeddings stay inside each process", fix)
    answer = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    number = next((word[2:] for word in answer.split() if word.startswith("v=")), "unknown")
    return Finding(f"cache.{role}", "ok", f"a private server, Redis {number}")


def configured_redis(role: str, url: str) -> Finding:
    wanted = "noeviction" if role == "media_redis_url" else "volatile-lfu"
    shown = configuration.without_password(url)
    try:
        client = redis.Redis.from_url(
            url.replace("redis+cluster://", "redis://"), socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
        )
        with client:
            client.ping()
            info = _info(client)
    except (redis.RedisError, ValueError) as exc:
        return Finding(f"cache.{role}", "wrong", f"{shown}: {exc}", f"start that server, or correct cache.{role}")
    policy = info.get("maxmemory_policy")
    found = f"{shown}, Redis {info['redis_version']}, {policy}" if info else f"{shown} answers"
    if policy not in (None, wanted):
        return Finding(
            f"cache.{role}", "note", found, f"`CONFIG SET maxmemory-policy {wanted}`, as in deploy/redis*.conf"
        )
    return Finding(f"cache.{role}", "ok", found)


def _info(client: redis.Redis) -> dict[str, Any]:
    """Empty if this user may not ask, as the user of deploy/redis.conf."""
    try:
        found: dict[str, Any] = client.info()
    except redis.exceptions.NoPermissionError:
        return {}
    return found


def serving_port(url: str) -> Finding:
    try:
        service.check_port(url)
    except service.ServiceError as exc:
        is_ours = "already serving" in str(exc)
        return Finding("port", "ok" if is_ours else "wrong", str(exc).partition(";")[0], str(exc).partition("; ")[2])
    return Finding("port", "ok", f"{url} is free")


def model(config: ModelConfig) -> Finding:
    """Whether the checkpoint is there and is one that can be split; its weights are not read."""
    resolved = resolve_model(config)
    try:
        directory = checkpoint_directory(resolved)
        found = load_config(directory)
    except (ValueError, OSError) as exc:
        fix = "give --model a checkpoint directory; without a network a hub id works only if it was downloaded before"
        return Finding("model", "wrong", f"{config.path}: {str(exc).splitlines()[0]}", fix)
    weights = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    if not weights and config.load_format == "safetensors":
        return Finding("model", "wrong", f"{directory} has no *.safetensors", "download the whole checkpoint")
    return Finding("model", "ok", f"{config.path}: {found.model_type}, {weights / 1e9:.3g} GB")
