"""OpenAI's client, 2.x and 3.x: chat completions, whole and streamed, completions, responses, models, errors."""

import base64
import sys
from pathlib import Path

import openai

url, picture = sys.argv[1:]
data_url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model

messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What colour is the circle?"},
            {"type": "image_url", "image_url": {"url": data_url, "detail": "high"}},
        ],
    }
]
answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_completion_tokens=20)
assert answer.choices[0].message.content == "red", answer
assert answer.usage.prompt_tokens_details.cached_tokens >= 0

stream = client.chat.completions.create(
    model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}, user="someone"
)
chunks = list(stream)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "red"
assert chunks[-1].usage.total_tokens == answer.usage.total_tokens

conversation = [
    *messages,
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "What colour is the square?"},
]
again = client.chat.completions.create(model=model, messages=conversation, temperature=0)
assert again.choices[0].message.content == "blue", again

response = client.responses.create(
    model=model,
    temperature=0,
    input=[
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": data_url, "detail": "auto"},
                {"type": "input_text", "text": "What colour is the circle?"},
            ],
        }
    ],
)
assert response.output_text == "red", response
with client.responses.stream(model=model, input="How many?", temperature=0) as events:
    final = events.get_final_response()
assert final.status == "completed" and final.output_text

completion = client.completions.create(model=model, prompt="What colour", max_tokens=3, temperature=0)
assert completion.usage.completion_tokens <= 3

try:
    client.chat.completions.create(model="nothing", messages=messages)
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
else:
    raise AssertionError("an unknown model was answered")
try:
    client.chat.completions.create(model=model, messages=messages, temperature=9)
except openai.BadRequestError as error:
    assert error.param == "temperature"
else:
    raise AssertionError("a temperature of 9 was taken")
