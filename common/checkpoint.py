"""Loads the vision or the language half of a vision-language checkpoint, and nothing of the other half.

The model class is pruned in `__init__`, which runs on the meta device; transformers' own `from_pretrained` then finds
no place for the other half's tensors and never reads them.
"""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import blake3
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from common.config import ModelConfig
from common.families import family_of
from common.geometry import ImageGeometry
from common.identity import framed_digest

transformers_logging.disable_progress_bar()

Half = Literal["vision", "language"]

GIB = 1024**3

_DECODER_NAMES = ("language_model", "text_model")  # every other child of the base model belongs to the vision half
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class LoadedHalf:
    """`model` is the stock class with the other half absent; `digest` names the weights that were loaded."""

    model: PreTrainedModel
    config: Any
    device: torch.device
    dtype: torch.dtype
    digest: str


class Absent(nn.Module):
    """Stands where a pruned child was: keeps its config, because forwards read it, and refuses to run."""

    def __init__(self, name: str, config: Any = None) -> None:
        super().__init__()
        self.name, self.config = name, config

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{self.name} is not loaded in this process")


def checkpoint_directory(config: ModelConfig) -> Path:
    """The directory of `config.path`, downloaded first if it is an id of the hub."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or config.path.startswith("."):
        raise ValueError(f"model path {config.path!r} is not a directory")
    return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=_CHECKPOINT_FILES))


def load_config(directory: Path) -> Any:
    """The checkpoint's transformers configuration. Raises ValueError for a model Fovea cannot split."""
    if (directory / "adapter_config.json").exists():
        adapter = json.loads((directory / "adapter_config.json").read_text())
        raise ValueError(
            f"{directory} has an adapter ({adapter.get('peft_type', 'LORA')}, rank {adapter.get('r')}, of "
            f"{adapter.get('base_model_name_or_path')}); merge it into its base model first"
        )
    config = AutoConfig.from_pretrained(directory)
    family_of(config)
    _check_quantisation(config)
    text_config = config.get_text_config()
    if text_config.is_encoder_decoder:
        raise ValueError(
            f"text models with an encoder of their own are not supported: {text_config.model_type} of "
            f"{text_config.num_layers} + {text_config.num_decoder_layers} layers"
        )
    return config


def load_preprocessor_config(directory: Path) -> dict[str, Any]:
    """What the checkpoint says of its image processor; empty means that processor's defaults.

    transformers 5 saves it inside of another file, which comes first, as there.
    """
    whole, own = directory / "processor_config.json", directory / "preprocessor_config.json"
    if whole.exists() and "image_processor" in (fields := json.loads(whole.read_text())):
        found: dict[str, Any] = fields["image_processor"]
        return found
    return json.loads(own.read_text()) if own.exists() else {}


def load_image_processor(directory: Path) -> Any:
    """The checkpoint's own image processor, as transformers has it for PIL, whatever else is installed."""
    return AutoImageProcessor.from_pretrained(directory, backend="pil")


def load_geometry(directory: Path, config: Any) -> ImageGeometry:
    """What images become in prompts. Raises ValueError for settings that the family does not support."""
    family = family_of(config)
    preprocessing = load_preprocessor_config(directory) if family.own_pixels else load_image_processor(directory)
    return family.geometry(config, preprocessing)


def load_half(model_config: ModelConfig, half: Half) -> LoadedHalf:
    """One half in eval mode on its device. Raises ValueError for any missing, mismatched or unmaterialised tensor."""
    directory = checkpoint_directory(model_config)
    config = load_config(directory)
    device = choose_device(model_config)
    dtype = choose_dtype(model_config, config, device)
    pruned = pruned_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], half)
    _check_memory(pruned, config, half, dtype, device)
    if model_config.load_format == "dummy":
        model = _with_dummy_weights(pruned, config, dtype)
    else:
        model = _from_checkpoint(pruned, config, directory, dtype, half)
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if left:
        raise ValueError(f"{directory}: never materialised for the {half} half: {left[:3]}")
    digest = weights_digest(model, half)
    return LoadedHalf(model=model.eval().to(device), config=config, device=device, dtype=dtype, digest=digest)


def choose_device(model_config: ModelConfig) -> torch.device:
    if model_config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(model_config.device)


def choose_dtype(model_config: ModelConfig, config: Any, device: torch.device) -> torch.dtype:
    if model_config.dtype != "auto":
        dtype = getattr(torch, model_config.dtype)
    else:
        dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.bfloat16
    assert isinstance(dtype, torch.dtype)
    return dtype


def device_capability(device: torch.device) -> str:
    """Device type and capability, with the thread count on CPU: what decides which kernels run."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda/{major}.{minor}"
    return f"cpu/{torch.backends.cpu.get_cpu_capability()}/{torch.get_num_threads()}-thread"


def _check_quantisation(config: Any) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        fields = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        method, bits = fields.get("quant_method", "unknown"), fields.get("bits")
        raise ValueError(f"quantised checkpoints are not supported: {method}{f', {bits} bits' if bits else ''}")


def _check_memory(
    pruned: type[PreTrainedModel], config: Any, half: Half, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError, before anything is read, for a half whose weights alone are more than its GPU has left."""
    if device.type != "cuda":
        return
    with torch.device("meta"):
        model = pruned(copy.deepcopy(config))
    model.tie_weights()
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    num_free, num_total = torch.cuda.mem_get_info(device)
    if num_bytes > num_free:
        raise ValueError(
            f"the {half} half does not fit: it has {num_bytes / GIB:.1f} GiB of weights in "
            f"{str(dtype).removeprefix('torch.')}, and {num_free / GIB:.1f} of {num_total / GIB:.1f} GiB are free on "
            f"{device}"
        )


def base_of(model: nn.Module) -> nn.Module:
    """The module that holds the two halves as children."""
    base = getattr(model, "model", None)
    return base if isinstance(base, nn.Module) else model


def decoder_of(model: nn.Module) -> Any:
    """The child that reads text; some families have a model with a head of its own there."""
    base = base_of(model)
    return getattr(base, next(name for name in _DECODER_NAMES if hasattr(base, name)))


def text_model_and_head(model: nn.Module) -> tuple[Any, Any]:
    """What makes hidden states of embeddings, and what makes logits of those."""
    decoder = decoder_of(model)
    if (head := decoder.get_output_embeddings()) is not None:
        return decoder.base_model, head
    return decoder, model.lm_head


def pruned_class(cls: type[PreTrainedModel], half: Half) -> type[PreTrainedModel]:
    """A subclass that builds one half only. Its name stays: transformers looks key renames up by class name."""

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _prune(self, half)

    members: dict[str, Any] = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "_keys_to_ignore_on_load_unexpected": [r".*"],  # the other half's keys
    }
    if half == "vision":  # nothing to tie, embed or generate with
        members |= {
            "_tied_weights_keys": None,
            "get_input_embeddings": lambda self: None,
            "get_output_embeddings": lambda self: None,
            "can_generate": classmethod(lambda cls: False),
        }
    return type(cls.__name__, (cls,), members)


def weights_digest(model: nn.Module, half: Half) -> str:
    """BLAKE3 of the names, dtypes, shapes and bytes of one half's parameters, in a whole or a pruned model."""
    base = base_of(model)
    decoder = next(name for name in _DECODER_NAMES if hasattr(base, name))
    prefix = "model." if base is not model else ""
    language = (f"{prefix}{decoder}.", "lm_head.")
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if name.startswith(language) == (half == "language"):
            digest.update(framed_digest(name, str(parameter.dtype), str(tuple(parameter.shape))).encode())
            digest.update(_raw_bytes(parameter))
    return digest.hexdigest()


def _prune(model: PreTrainedModel, half: Half) -> None:
    base = base_of(model)
    decoder = next(name for name in _DECODER_NAMES if hasattr(base, name))
    if half == "vision":
        setattr(base, decoder, Absent(decoder, getattr(base, decoder).config))
        if isinstance(getattr(model, "lm_head", None), nn.Module):
            model.lm_head = Absent("lm_head")
        for module in {model, base}:
            module.all_tied_weights_keys = {}  # both ends of the tie are gone
        return
    # Bare parameters of the base (image_newline, query_tokens) stay: _init_weights touches them by name.
    for name, child in list(base.named_children()):
        if name not in (decoder, "lm_head"):
            setattr(base, name, Absent(name, getattr(child, "config", None)))


def _from_checkpoint(
    cls: type[PreTrainedModel], config: Any, directory: Path, dtype: torch.dtype, half: Half
) -> PreTrainedModel:
    model, info = cls.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
    # from_pretrained only logs missing weights and leaves them random.
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info[problem]:
            raise ValueError(f"{directory}: {problem} for the {half} half: {list(info[problem])[:3]}")
    return model


def _with_dummy_weights(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights seeded by parameter name, so that two halves match the whole wherever they are made."""
    with no_init_weights():  # transformers' own would take six times as long as all else here, and have no seed
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith((".weight", ".bias")):
                parameter.fill_(name.endswith(".weight"))  # of norms, and of anything
            else:
                generator = torch.Generator().manual_seed(int(framed_digest("dummy", name)[:15], 16))
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
