"""The encoder all embedding peers share, in the two ways their users run one.

Configured by the environment: BENCH_WEIGHTS (MiniLM's directory), BENCH_RUNTIME ("torch":
sentence-transformers as its model card says; "ort": ONNX Runtime over the graph in BENCH_GRAPH,
as torch exports it), BENCH_THREADS.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

MAX_BATCH = 32
THREADS = int(os.environ.get("BENCH_THREADS", "1"))


class Encoder:
    """Vectors of sentences, float32 [n, 384]."""

    def __init__(self) -> None:
        self._weights = Path(os.environ["BENCH_WEIGHTS"])
        self._ort = os.environ.get("BENCH_RUNTIME", "torch") == "ort"
        if self._ort:
            self._load_ort()
        else:
            self._load_torch()
        for rows in (1, 8, MAX_BATCH):
            self.encode(["A sentence of some length to be warm for the first request."] * rows)

    def encode(self, texts: list[str]) -> np.ndarray:
        return self._encode_ort(texts) if self._ort else self._encode_torch(texts)

    def _load_torch(self) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(THREADS)
        self._model = SentenceTransformer(str(self._weights), device="cpu")

    def _encode_torch(self, texts: list[str]) -> np.ndarray:
        return self._model.encode(
            texts, batch_size=MAX_BATCH, show_progress_bar=False, convert_to_numpy=True
        )

    def _load_ort(self) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(self._weights / "tokenizer.json"))
        self._tokenizer.enable_truncation(256)
        self._tokenizer.enable_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            os.environ["BENCH_GRAPH"], options, providers=["CPUExecutionProvider"]
        )

    def _encode_ort(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(texts)
        ids = np.array([e.ids for e in encoded], dtype=np.int64)
        mask = np.array([e.attention_mask for e in encoded], dtype=np.int64)
        hidden = self._session.run(None, {"ids": ids, "mask": mask})[0]
        weights = mask[:, :, None].astype(np.float32)
        vectors = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
