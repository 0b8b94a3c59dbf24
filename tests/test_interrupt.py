"""Ctrl-C in a terminal, which reaches every process of the command, leaves the cluster able to end in order."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import time
from deploy import service
with service.ray_cluster(lambda line: None) as dashboard:
    client = service.connect(dashboard)
    client.get_serve_details()
    try:
        print("running", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)  # what it would end has ended by now
        print("answers" if "applications" in client.get_serve_details() else "silent", flush=True)
"""


@pytest.mark.serve
def test_dashboard_answers_after_control_c() -> None:
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "running\n"
            os.killpg(process.pid, signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "answers\n"
            assert process.returncode == 0
        finally:
            process.kill()
