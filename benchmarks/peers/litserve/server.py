"""LitServe with its batching on."""

from __future__ import annotations

import os

import litserve
from encoder import MAX_BATCH, Encoder

BATCH_TIMEOUT_S = float(os.environ.get("BENCH_BATCH_WAIT_S", "0.002"))


class Embed(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.encoder = Encoder()

    def decode_request(self, request: dict) -> str:
        return request["text"]

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def predict(self, texts: list[str] | str) -> list:
        # A batch of one comes without `batch`, if batching is off.
        return self.encoder.encode([texts] if isinstance(texts, str) else texts)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, vector) -> dict:
        return {"embedding": vector.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Embed(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S),
        accelerator="cpu",
        fast_queue=os.environ.get("BENCH_FAST_QUEUE", "0") == "1",
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
