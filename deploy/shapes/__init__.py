"""The embedded model: a small Qwen2-VL that answers questions about drawn scenes in English and Chinese.

`scenes` draws, `questions` asks, `tokenizer` and `model` define what is trained, `batches` and `train` train it,
`evaluate` measures it. The trained checkpoint is an ordinary Hugging Face directory and is part of the package.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
