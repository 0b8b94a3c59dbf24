"""Binds the deployments into one application; the only place that knows all packages."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from ray import serve

from common.checkpoint import load_config
from common.config import CacheConfig, Config, ModelConfig
from deploy.one_piece import OnePieceDeployment
from deploy.private_redis import with_private_servers
from deploy.shapes import CHECKPOINT
from encoder_service.config import EncoderConfig
from encoder_service.deployment import EncoderDeployment
from llm_service.config import ApiConfig, EngineConfig
from llm_service.deployment import LLMDeployment

APPLICATION = "fovea"
EMBEDDED_MODEL = "shapes"


class AppConfig(Config):
    """`args:` of the YAML: what the model does. How many replicas, and where, is in Serve's `deployments:`."""

    model: ModelConfig = Field(ModelConfig(path=EMBEDDED_MODEL), description="default: the embedded shapes model")
    encoder: EncoderConfig = EncoderConfig()
    engine: EngineConfig = EngineConfig()
    cache: CacheConfig = CacheConfig()
    api: ApiConfig = ApiConfig()
    backend: Literal["split", "transformers"] = Field(
        "split", description="`transformers`: the one-piece model in the `llm` deployment alone, as a baseline"
    )

    @model_validator(mode="after")
    def _baseline_is_whole(self) -> Self:
        if self.backend == "transformers" and self.model.token_reduction is not None:
            raise ValueError("model.token_reduction is for the split service, not for the transformers backend")
        return self


def build_app(config: AppConfig) -> serve.Application:
    """The application that `serve run`, `serve deploy` and `fovea up` deploy."""
    model = resolve_model(config.model)
    if (directory := Path(model.path).expanduser()).is_dir():
        load_config(directory)  # refuses at once what every replica would
    cache = with_private_servers(config.cache)
    if config.backend == "transformers":
        baseline: serve.Application = OnePieceDeployment.bind(model, config.engine, cache, config.api)  # type: ignore[attr-defined]
        return baseline
    encoder = EncoderDeployment.bind(model, config.encoder, cache)  # type: ignore[attr-defined]  # by Serve's decorator
    application: serve.Application = LLMDeployment.bind(model, config.engine, cache, config.api, encoder)  # type: ignore[attr-defined]
    return application


def resolve_model(model: ModelConfig) -> ModelConfig:
    """`shapes` names the embedded checkpoint, wherever the package is installed."""
    if model.path != EMBEDDED_MODEL:
        return model
    return model.model_copy(update={"path": str(CHECKPOINT), "served_name": model.served_name or EMBEDDED_MODEL})
