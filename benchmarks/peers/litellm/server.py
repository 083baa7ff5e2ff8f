"""LiteLLM's proxy, one worker, one OpenAI-compatible model behind it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CONFIG = """\
model_list:
- model_name: chat
  litellm_params: {{model: openai/chat, api_base: "http://127.0.0.1:{upstream}/v1", api_key: x}}
litellm_settings: {{set_verbose: false, num_retries: 0}}
general_settings: {{master_key: "{key}"}}
"""


def main() -> None:
    config = Path(os.environ["BENCH_DIR"]) / "litellm.yaml"
    upstream, key = os.environ["BENCH_UPSTREAM"], os.environ["BENCH_KEY"]
    config.write_text(CONFIG.format(upstream=upstream, key=key))
    program = str(Path(sys.executable).with_name("litellm"))
    options = ["--config", str(config), "--host", "127.0.0.1", "--port", os.environ["BENCH_PORT"]]
    os.execv(program, [program, *options, "--num_workers", "1"])


if __name__ == "__main__":
    main()
