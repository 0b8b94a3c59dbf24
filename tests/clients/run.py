"""`make clients`: official clients, each in an environment of its own, against a service with the embedded model.

    python tests/clients/run.py [CLIENT...] [--record]

Each script of this folder is called with the URL and a picture of a red circle and a blue square, and fails unless what
it asks is answered right. `--record` writes the requests that it sent to `requests/`, where every picture stands as
`{picture}`; test_recorded.py replays them without the clients.
"""

import argparse
import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2

from deploy import service
from deploy.demo import PICTURES
from deploy.shapes.scenes import render

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".venv-clients"

# What each script is run with. The clients exclude each other: litellm needs openai 2.
REQUIREMENTS = {
    "openai3": ["openai==3.52.0"],
    "openai2": ["openai>=2.20,<3"],
    "anthropic": ["anthropic==2.11.0"],
    "langchain": ["langchain-openai==1.7.3"],
    "litellm": ["litellm==1.106.2"],
    "guidellm": ["guidellm[vision]==0.8.1"],
    "aiperf": ["aiperf==0.13.0"],
}
SCRIPTS = {"openai3": "use_openai.py", "openai2": "use_openai.py"}
TIMEOUT_S = 180
DATA_URL = re.compile(r"(data:image/\w+;base64,)[A-Za-z0-9+/=]+")
KEPT_HEADERS = ("anthropic-version", "anthropic-beta", "content-type")


class Recorder:
    """A proxy in front of the service that keeps what passes, and what passes again once."""

    def __init__(self, url: str, picture: bytes) -> None:
        recorder = self
        self.requests: list[dict[str, Any]] = []
        encoded = base64.b64encode(picture).decode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._forward(b"")

            def do_POST(self) -> None:
                self._forward(self.rfile.read(int(self.headers.get("content-length", 0))))

            def _forward(self, body: bytes) -> None:
                text = DATA_URL.sub(r"\1{picture}", body.decode().replace(encoded, "{picture}"))  # some draw their own
                found = json.loads(text) if body else None
                headers = {name: self.headers[name] for name in KEPT_HEADERS if name in self.headers}
                request = {"method": self.command, "path": self.path, "headers": headers, "body": found}
                if request not in recorder.requests:
                    recorder.requests.append(request)
                answer = httpx2.request(self.command, url + self.path, content=body, headers=headers, timeout=TIMEOUT_S)
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers["content-type"])
                self.send_header("content-length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def write(self, name: str) -> None:
        path = HERE / "requests" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(self.requests, indent=1, ensure_ascii=False) + "\n")
        self.requests.clear()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("clients", nargs="*", default=list(REQUIREMENTS), help=", ".join(REQUIREMENTS))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--url", help="a running service with the embedded model; default: one that is started")
    arguments = parser.parse_args()
    pythons = {name: environment(name) for name in arguments.clients}
    picture = Path(tempfile.mkdtemp()) / "picture.png"
    render(PICTURES["two-shapes.png"]).save(picture)
    failed = []
    with serving(arguments.url) as url:
        recorder = Recorder(url, picture.read_bytes()) if arguments.record else None
        for name, python in pythons.items():
            started = time.monotonic()
            script = HERE / SCRIPTS.get(name, f"use_{name}.py")
            command = [str(python), str(script), url if recorder is None else recorder.url, str(picture)]
            status = subprocess.run(command, timeout=TIMEOUT_S, env=bare_environment(), check=False).returncode
            print(
                f"{name:10} {'passed' if status == 0 else 'FAILED'} in {time.monotonic() - started:.1f} s", flush=True
            )
            if status:
                failed.append(name)
            elif recorder is not None:
                recorder.write(name)
    return 1 if failed else 0


@contextlib.contextmanager
def serving(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with service.running_service(service.application_config(port=service.free_port()), print) as running:
        yield running.url


def environment(name: str) -> Path:
    """The python of this client's own environment, which is made if need be."""
    directory = ENVIRONMENTS / name
    python = directory / "bin" / "python"
    if not (directory / "ready").exists():
        print(f"installing {' '.join(REQUIREMENTS[name])}", flush=True)
        venv.create(directory, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], check=True)
        (directory / "ready").touch()
    return python


def bare_environment() -> dict[str, str]:
    """Without this repository on the path, and with nothing looked up on the network."""
    names = ("PATH", "HOME", "LANG", "TMPDIR")
    return {name: os.environ[name] for name in names if name in os.environ} | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


if __name__ == "__main__":
    sys.exit(main())
