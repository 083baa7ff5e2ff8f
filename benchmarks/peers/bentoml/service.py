"""BentoML with a batchable API: its dispatcher adapts the batch to a latency objective."""

from __future__ import annotations

import bentoml
import numpy as np
from encoder import MAX_BATCH, Encoder


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 256})
class Embed:
    def __init__(self) -> None:
        self.encoder = Encoder()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=1000, route="/embed")
    def embed(self, texts: list[str]) -> np.ndarray:
        return self.encoder.encode(texts)
