"""Log lines of a replica go where Ray Serve's go."""

import logging
from collections.abc import Iterator

import pytest

from common.logs import log_as_serve_does


@pytest.fixture
def serve() -> Iterator[logging.Logger]:
    """Serve's logger as in a replica, and all loggers as they were afterwards."""
    names = ("ray.serve", "common", "encoder_service", "llm_service", "deploy")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    loggers[0].handlers, loggers[0].propagate = [_Lines()], False
    loggers[0].setLevel(logging.INFO)
    yield loggers[0]
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_lines_of_every_package_are_in_serves_log(serve: logging.Logger) -> None:
    log_as_serve_does()
    for name in ("common.cache", "encoder_service.server", "llm_service.engine.scheduler", "deploy.app", "other"):
        logging.getLogger(name).info("from %s", name)
    logging.getLogger("common.cache").debug("too much")
    assert serve.handlers[0].lines == [  # type: ignore[attr-defined]
        "from common.cache",
        "from encoder_service.server",
        "from llm_service.engine.scheduler",
        "from deploy.app",
    ]
