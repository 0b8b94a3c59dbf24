"""litellm, as OpenAI's and as vLLM's provider."""

import base64
import sys
from pathlib import Path

import litellm

url, picture = sys.argv[1:]
data = base64.b64encode(Path(picture).read_bytes()).decode()
messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What colour is the circle?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        ],
    }
]
for provider in ("openai", "hosted_vllm"):
    request = {
        "model": f"{provider}/shapes",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "messages": messages,
        "temperature": 0,
        "num_retries": 0,
    }
    answer = litellm.completion(**request)
    assert answer.choices[0].message.content == "red", answer
    assert answer.usage.prompt_tokens_details.image_tokens == 64
    chunks = list(litellm.completion(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "red"
try:
    litellm.completion(**request | {"model": "openai/nothing"})
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model was answered")
