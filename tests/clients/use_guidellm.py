"""guidellm: a short benchmark with drawn pictures, as its users run it; every request must succeed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, _ = sys.argv[1:]
tokenizer = Path(__file__).parents[2] / "deploy" / "shapes" / "checkpoint"
report = Path(tempfile.mkdtemp()) / "report.json"
options = {
    "backend": f"kind=openai_http,target={url},model=shapes",
    "profile": "kind=concurrent,streams=2",
    "constraint": "kind=max_requests,count=6",
    "tokenizer": f"kind=huggingface_auto,model={tokenizer}",
    "data": "kind=synthetic_image,width=120,height=90,output_tokens=8",
    "output": f"kind=json,path={report}",
}
command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
for name, value in options.items():
    command += [f"--{name}", value]
subprocess.run(command, env=os.environ | {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}, timeout=100, check=True)
(benchmark,) = json.loads(report.read_text())["benchmarks"]
assert benchmark["metrics"]["request_totals"] == {"successful": 6, "errored": 0, "incomplete": 0, "total": 6}
assert benchmark["metrics"]["output_token_count"]["successful"]["total_sum"] == 48
