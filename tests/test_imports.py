"""The rule of who may import whom: packages import downwards only, and libraries stay in their rooms."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "common": set(),
    "encoder_service": {"common"},
    "llm_service": {"common"},
    "deploy": {"common", "encoder_service", "llm_service"},
}
# library -> the files below the repository that may import it; a name ending in / is a folder
ROOMS = {
    "ray": (
        "common/metrics.py",
        "encoder_service/deployment.py",
        "llm_service/deployment.py",
        "deploy/",
    ),
    "redis": ("common/redis_store.py", "common/media_storage.py", "deploy/bench/", "deploy/doctor.py"),
    "fastapi": ("llm_service/api/", "llm_service/deployment.py", "deploy/one_piece.py"),
    "starlette": ("llm_service/api/",),
    "PIL": ("common/media.py", "encoder_service/", "llm_service/clip_decoder.py", "deploy/"),
    "av": ("llm_service/clip_decoder.py",),
    "transformers": ("common/", "encoder_service/", "llm_service/", "deploy/"),
    "torch": ("common/", "encoder_service/", "llm_service/", "deploy/"),
    "triton": ("encoder_service/kernels.py", "llm_service/engine/kernels.py"),
    "opentelemetry": ("common/tracing.py",),
    "pickle": (),
}
# inside the LLM service imports go one way: deployment -> api -> server -> engine
LAYERS = ("llm_service.engine", "llm_service.server", "llm_service.api", "llm_service.deployment")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_downwards_only_and_libraries_stay_in_their_rooms(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    package = name.split("/")[0]
    modules = list(imported_modules(path))
    tops = {module.split(".")[0] for module in modules}
    assert tops & PACKAGES.keys() <= PACKAGES[package] | {package}
    for library, rooms in ROOMS.items():
        if library in tops:
            assert any(name == room or (room.endswith("/") and name.startswith(room)) for room in rooms), library
    layer = next((index for index, prefix in enumerate(LAYERS) if name.replace("/", ".").startswith(prefix)), None)
    if layer is not None:
        above = tuple(LAYERS[layer + 1 :])
        assert not [module for module in modules if module.startswith(above)]
    if name.startswith("llm_service/engine/"):
        assert (
            tops
            <= {"common", "llm_service", "torch", "transformers", "numpy", "llguidance", "triton"}
            | sys.stdlib_module_names
        )


def test_no_import_inside_a_function_dodges_a_cycle() -> None:
    # so that --help answers at once; ray.data has dependencies that are optional
    lazy = {
        "deploy/cli.py",
        "deploy/config_cli.py",
        "deploy/media_cli.py",
        "deploy/media_client.py",
        "deploy/bench/cli.py",
    }
    for path in source_files():
        if str(path.relative_to(ROOT)) in lazy:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)]
                assert not inner, f"{path}: {node.name} imports"
