"""What a benchmark says about itself: the machine, the versions, the command line; a table on the screen, one file."""

import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_MIN_WIDTH = 110
_PACKAGES = ("torch", "numpy", "redis", "hiredis", "msgpack", "xxhash", "blake3")


def circumstances(**others: str) -> dict[str, Any]:
    """Without which figures say nothing."""
    return {
        "command": shlex.join(["fovea", *sys.argv[1:]]),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        **others,
    }


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of the same fields; numbers to three digits."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=max(Console().width, _MIN_WIDTH)).print(table)


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(seconds) * 1000, "min_ms": min(seconds) * 1000}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
