"""Text generation on GPUs through vLLM's own engine (`pip install nearfield[vllm]`).

Prompts are rendered and checked by the same code as engine generate, so that a model answers a
bad request in the same words on either; vLLM batches, decodes and constrains.
"""

from __future__ import annotations

import logging
import time
from typing import Any, cast

from nearfield.api.events import (
    Completed,
    Event,
    FinishReason,
    GenerateRequest,
    Request,
    Text,
    Timings,
    TokenLogprob,
)
from nearfield.api.tools import detect
from nearfield.core.errors import BadRequest
from nearfield.core.spec import VllmEngine as VllmSpec
from nearfield.serving.engines.base import (
    Capabilities,
    EngineContext,
    EngineStats,
    LoopEngine,
)
from nearfield.serving.engines.grammar import tool_call_rule
from nearfield.serving.engines.prompt import prepare
from nearfield.serving.engines.text import TextModel

log = logging.getLogger("nearfield.engine")


class VllmEngine(LoopEngine):
    """One vLLM `AsyncLLM`."""

    def load(self, context: EngineContext) -> Capabilities:
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise BadRequest(
                "engine vllm is not installed here: pip install 'nearfield[vllm]' on a machine "
                "with a GPU, or use engine: generate."
            ) from error
        if context.weights is None:
            raise BadRequest("engine vllm needs a source")
        spec = self._spec = cast(VllmSpec, context.spec.engine)
        self.text = TextModel(context.weights)
        self._tool_format = detect(self.text.template_source or "")
        args: dict[str, Any] = {
            "model": str(context.weights),
            "dtype": context.spec.dtype,
            "max_model_len": spec.max_model_len,
            "gpu_memory_utilization": spec.gpu_memory_utilization,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "quantization": spec.quantization,
            "trust_remote_code": False,
            "structured_outputs_config": {"backend": "guidance"},
        }
        self.start_loop(context.emit, ["generate"])
        self._tokens = 0
        try:
            engine_args = AsyncEngineArgs(**(args | spec.engine_args))
            self._llm = self.run(_build(AsyncLLM, engine_args))
        except (ValueError, RuntimeError, TypeError) as error:
            first = str(error).strip().split("\n")[0][:300]
            raise BadRequest(f"vLLM cannot serve this model: {first}") from error
        config = self._llm.model_config
        self._max_model_len = int(config.max_model_len)
        self._vocab_size = int(config.get_vocab_size())
        return Capabilities(
            tasks=frozenset({"generate"}),
            platform="nearfield_vllm",
            max_model_len=self._max_model_len,
            chat=self.text.template_source is not None,
            tool_format=self._tool_format,
            detail={"dtype": str(config.dtype), "device": "cuda"},
        )

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._tasks), tokens=self._tokens)

    def close(self) -> None:
        self._llm.shutdown()
        super().close()

    def _params(self, request: GenerateRequest, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        s = request.sampling
        structured = None
        match request.constraint:
            case None:
                pass
            case c if c.kind == "json_schema":
                structured = StructuredOutputsParams(json=c.value)
            case c if c.kind == "json_object":
                structured = StructuredOutputsParams(json_object=True)
            case c if c.kind == "regex":
                structured = StructuredOutputsParams(regex=c.value)
            case c:
                structured = StructuredOutputsParams(grammar=tool_call_rule(c, self._tool_format))
        return SamplingParams(
            n=request.n,
            max_tokens=max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            stop=list(s.stop),
            logprobs=s.logprobs,
            ignore_eos=s.ignore_eos,
            structured_outputs=structured,
            output_kind=RequestOutputKind.DELTA,
        )

    async def answer(self, request_id: str, request: Request, started_s: float) -> Event:
        assert isinstance(request, GenerateRequest)
        prompt, max_tokens = prepare(
            self.text,
            request,
            vocab_size=self._vocab_size,
            max_model_len=self._max_model_len,
            default_max_tokens=self._spec.default_max_tokens,
        )
        try:
            params = self._params(request, max_tokens)
        except ValueError as error:  # vLLM's own checks of sampling parameters and schemas
            raise BadRequest(str(error)[:300]) from error
        first_s: float | None = None
        completion_tokens = cached_tokens = 0
        if request.echo:
            text = self.text.tokenizer.decode(prompt)
            self._emit([(request_id, Text(text, i, tokens=0)) for i in range(request.n)])
        outputs = self._llm.generate({"prompt_token_ids": prompt}, params, request_id)
        async for output in outputs:
            first_s = first_s or time.monotonic()
            cached_tokens = output.num_cached_tokens or 0
            events: list[tuple[str, Event]] = []
            for part in output.outputs:
                completion_tokens += len(part.token_ids)
                events.append((request_id, self._text(part, request.sampling.logprobs)))
            self._tokens += sum(len(part.token_ids) for part in output.outputs)
            self._emit(events)
        now_s = time.monotonic()
        first_s = first_s or now_s
        timings = Timings(started_s, prefill_s=first_s - started_s, decode_s=now_s - first_s)
        return Completed(len(prompt), completion_tokens, timings, cached_tokens)

    def _text(self, part: Any, logprobs: int | None) -> Text:
        reason = part.finish_reason
        finish: FinishReason | None = None if reason is None else _REASONS.get(reason, "stop")
        stop = part.stop_reason if isinstance(part.stop_reason, str) else None
        tokens = tuple(part.token_ids)
        told: tuple[TokenLogprob, ...] | None = None
        if logprobs is not None:
            told = tuple(
                self._logprob(token, table, logprobs)
                for token, table in zip(tokens, part.logprobs or (), strict=False)
            )
        return Text(part.text, part.index, len(tokens), finish, stop, told)

    def _logprob(self, token: int, table: dict[int, Any], k: int) -> TokenLogprob:
        ranked = sorted(table.items(), key=lambda item: -item[1].logprob)[:k]
        top = tuple((*self.text.token(other), float(entry.logprob)) for other, entry in ranked)
        return TokenLogprob(*self.text.token(token), float(table[token].logprob), top)


_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


async def _build(kind: Any, engine_args: Any) -> Any:
    """Build the engine inside its loop: it binds to the running one."""
    return kind.from_engine_args(engine_args)
