"""aiperf: a short benchmark with drawn pictures, as its users run it; every request must succeed."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, _ = sys.argv[1:]
tokenizer = Path(__file__).parents[2] / "deploy" / "shapes" / "checkpoint"
directory = Path(tempfile.mkdtemp())
options = {
    "model": "shapes",
    "url": url,
    "endpoint-type": "chat",
    "tokenizer": str(tokenizer),
    "request-count": "6",
    "concurrency": "2",
    "workers-max": "1",
    "image-width-mean": "120",
    "image-height-mean": "90",
    "osl": "8",
    "isl": "16",
    "output-artifact-dir": str(directory),
    "ui": "none",
}
command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--streaming"]
for name, value in options.items():
    command += [f"--{name}", value]
subprocess.run(command, timeout=150, check=True)
report = json.loads((directory / "profile_export_aiperf.json").read_text())
assert report["request_count"]["avg"] == 6 and not report["error_summary"], report
