"""Ctrl-C in a terminal, which reaches every process of the command, and SIGTERM end a service in order."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import signal
import time
for number in (signal.SIGINT, signal.SIGTERM):  # which a shell has its background jobs ignore
    signal.signal(number, signal.default_int_handler)
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
@pytest.mark.parametrize("terminate", [False, True], ids=["control-c", "sigterm"])
def test_dashboard_answers_when_the_command_is_told_to_end(terminate: bool) -> None:
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
            if terminate:
                process.terminate()
            else:
                os.killpg(process.pid, signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "answers\n"
            assert process.returncode == 0
        finally:
            process.kill()
