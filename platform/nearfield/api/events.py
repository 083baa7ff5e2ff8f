"""The neutral request and the events that answer it.

Every protocol is parsed into one of three requests, every engine answers with these events and
every protocol renders them. They are plain data and cross a process boundary, so: no handles,
no callables, and numpy arrays rather than tensors of any framework.

A request is answered by any number of `Text` events and then exactly one terminal event:
`Completed`, `Embedded`, `Inferred` or `Failed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from nearfield.core.errors import NearfieldError
from numpy.typing import NDArray

Task = Literal["generate", "embed", "tensor"]
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Defaults are OpenAI's.

    Attributes:
        max_tokens: bound on new tokens per choice; None: the engine's default.
        top_k: 0 keeps all tokens. min_p: 0 keeps all.
        repetition_penalty: 1 is off (the multiplicative form, on prompt and output).
        logprobs: None: not wanted; k: the chosen token's and the k most likely ones'.
        ignore_eos: go on to max_tokens (for load tests).
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must look like; the engine guarantees it.

    kind "json_schema" carries the schema, "json_object" any JSON object, "regex" a pattern,
    "tool_call" the JSON schema of the one call that must be made (in the model's own call format).
    """

    kind: Literal["json_schema", "json_object", "regex", "tool_call"]
    value: Any = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Text generation. Exactly one of `messages`, `prompt`, `prompt_tokens` is set.

    Attributes:
        messages: chat messages as the chat template takes them (OpenAI's own shape).
        tools: OpenAI tool definitions, rendered by the chat template.
        n: how many choices; events carry the choice's index.
        echo: completions only: the prompt's text comes back first.
        deadline_s: absolute, on this host's `time.monotonic()` clock.
        flow: whose it is, where those who share a replica are served in turn (`policy.fair`).
    """

    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    n: int = 1
    echo: bool = False
    deadline_s: float | None = None
    flow: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    task: ClassVar[Task] = "generate"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Embeddings of texts, or of token lists. `dimensions` cuts and renormalises vectors."""

    inputs: tuple[str, ...] | tuple[tuple[int, ...], ...]
    dimensions: int | None = None
    deadline_s: float | None = None
    flow: str = ""
    task: ClassVar[Task] = "embed"


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """Named tensors in, named tensors out. BYTES tensors are object arrays of `bytes`.

    `outputs`: the wanted outputs by name; empty: all.
    """

    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None
    flow: str = ""
    task: ClassVar[Task] = "tensor"


Request = GenerateRequest | EmbedRequest | TensorRequest


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, seconds. `started_s` is on `time.monotonic()`.

    queue_s: accepted by the engine → first computed; prefill_s: → first token (or the result);
    decode_s: → last token; batch_size: the most requests it shared a step or batch with.
    """

    started_s: float
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    batch_size: int = 1
    steps: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text, its bytes, its natural-log probability and the likeliest alternatives'."""

    token: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """New text of one choice; `finish_reason` is set on the choice's last one (text may be "").

    `stop_reason`: the stop string that ended it, if one did. `tokens`: how many tokens it stands
    for (0 where a token completes no character yet).
    """

    text: str
    choice: int = 0
    tokens: int = 1
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    terminal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Completed:
    """Ends a generation: all choices have finished."""

    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    cached_tokens: int = 0
    terminal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Embedded:
    """Ends an embedding: `vectors` is float32 [inputs, dimensions]."""

    vectors: NDArray[np.float32]
    prompt_tokens: int
    timings: Timings
    terminal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Inferred:
    """Ends a tensor request: the wanted outputs by name."""

    outputs: dict[str, NDArray[Any]]
    timings: Timings
    terminal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Failed:
    """Ends any request that could not be answered."""

    error: NearfieldError
    terminal: ClassVar[bool] = True


Event = Text | Completed | Embedded | Inferred | Failed
