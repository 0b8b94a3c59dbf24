"""langchain-openai: invoke and stream, with its own form of images."""

import base64
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

url, picture = sys.argv[1:]
data = base64.b64encode(Path(picture).read_bytes()).decode()
model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="shapes", temperature=0, max_retries=0)
question = {"type": "text", "text": "What colour is the circle?"}
forms = [
    {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": data},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
]
for form in forms:
    message = HumanMessage(content=[question, form])
    answer = model.invoke([message])
    assert answer.content == "red", answer
    assert answer.usage_metadata["input_tokens"] > 64
    assert "".join(str(chunk.content) for chunk in model.stream([message])) == "red"
