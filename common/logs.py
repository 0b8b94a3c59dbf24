"""Where the log lines of a replica go."""

import logging

_PACKAGES = ("common", "encoder_service", "llm_service", "deploy")


def log_as_serve_does() -> None:
    """Writes our lines into Ray Serve's logs of this replica: its files, its format (`logging_config`), request ids."""
    serve = logging.getLogger("ray.serve")
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = serve.handlers
        logger.setLevel(serve.getEffectiveLevel())
        logger.propagate = not serve.handlers
