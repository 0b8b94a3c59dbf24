"""Anthropic's client: messages, whole and streamed, token counts, errors."""

import base64
import sys
from pathlib import Path

import anthropic

url, picture = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
data = base64.b64encode(Path(picture).read_bytes()).decode()
messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What colour is the circle?"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        ],
    }
]
message = client.messages.create(model="shapes", max_tokens=20, messages=messages)
assert message.content[0].text == "red", message
assert message.stop_reason == "end_turn"

with client.messages.stream(model="shapes", max_tokens=20, messages=messages) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == final.content[0].text == "red"
assert final.usage.output_tokens == message.usage.output_tokens

count = client.messages.count_tokens(model="shapes", messages=messages)
usage = message.usage
assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens

try:
    client.messages.create(model="nothing", max_tokens=20, messages=messages)
except anthropic.NotFoundError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("an unknown model was answered")
