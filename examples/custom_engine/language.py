"""A model of one's own: which language is a text in?

Naive Bayes over sequences of one to four letters, learnt at start-up from one short sample per
language in `profiles/`.

    POST /language/v2/models/language/infer   text BYTES [n] → language BYTES [n], score FP32 [n]
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from nearfield.core.errors import BadRequest
from nearfield.serving.engines.base import EngineContext, FunctionEngine, TensorMetadata
from numpy.typing import NDArray

BUCKETS = 2**14
SMOOTHING = 0.02


class Language(FunctionEngine):
    """Tells languages apart. `options: {profiles: DIRECTORY}`, beside this file."""

    inputs = (TensorMetadata("text", "BYTES", (-1,)),)
    outputs = (TensorMetadata("language", "BYTES", (-1,)), TensorMetadata("score", "FP32", (-1,)))

    def setup(self, context: EngineContext) -> None:
        """Learn from the samples: `log_shares` is [languages, buckets]."""
        directory = Path(__file__).parent / context.options.get("profiles", "profiles")
        samples = {path.stem: path.read_text("utf-8") for path in sorted(directory.glob("*.txt"))}
        if not samples:
            raise BadRequest(f"options.profiles: there is no *.txt in {directory.name}")
        self.languages = np.array([name.encode() for name in samples], dtype=object)
        counts = np.stack([count(sample) for sample in samples.values()]) + SMOOTHING
        self.log_shares = np.log(counts / counts.sum(axis=1, keepdims=True))

    def infer(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The likeliest language of each text, and how likely it is among those known."""
        try:
            texts = [raw.decode("utf-8") for raw in inputs["text"]]
        except UnicodeDecodeError:
            raise BadRequest("text must be UTF-8", param="text") from None
        logits = np.stack([count(text) for text in texts]) @ self.log_shares.T
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return {
            "language": self.languages[shares.argmax(axis=1)],
            "score": shares.max(axis=1).astype(np.float32),
        }


def count(text: str) -> NDArray[np.float64]:
    """How often each sequence of one to four letters occurs, hashed into BUCKETS."""
    counts = np.zeros(BUCKETS)
    words = re.findall(r"[^\W\d_]+", text.lower())
    padded = f" {' '.join(words)} "
    for length in (1, 2, 3, 4):
        for start in range(len(padded) - length + 1):
            counts[zlib.crc32(padded[start : start + length].encode()) % BUCKETS] += 1
    return counts
