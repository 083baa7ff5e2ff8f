"""Constrained output: JSON schemas, regular expressions and tool calls, through llguidance.

A grammar is compiled once for a schema and kept in a bounded cache; compiling and matching have
llguidance's own limits, so that a hostile schema costs its own request and nothing else.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from nearfield.api.events import Constraint
from nearfield.api.tools import FORMATS
from nearfield.core.errors import BadRequest
from nearfield.serving.engines.text import TextModel
from torch import Tensor

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

CACHED_GRAMMARS = 64
JSON_STYLE: JsonCompileOptions = {"whitespace_pattern": r"(\x20|\x0D?\x0A[\x20\x09]{0,32})?"}
"""Between two tokens of JSON: nothing, a space, or a new line and its indentation. Any whitespace
would be valid, and a model that is lost writes nothing else until its tokens are spent."""


class Matcher:
    """The state of one sequence in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = np.zeros((1, (vocab_size + 31) // 32), dtype=np.int32)

    def mask(self, scores: Tensor) -> None:
        """Set the scores [vocab] of tokens that may not come next to -inf, in place."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        size = min(scores.shape[-1], bits.size)
        allowed = torch.from_numpy(bits[:size].astype(np.bool_)).to(scores.device)
        scores[:size].masked_fill_(~allowed, -torch.inf)
        scores[size:] = -torch.inf

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Nothing may follow: the output is complete."""
        return bool(self._matcher.is_stopped())

    @property
    def failed(self) -> bool:
        return bool(self._matcher.is_error())


class GrammarCompiler:
    """Makes matchers for one model's vocabulary."""

    def __init__(self, text: TextModel, vocab_size: int, tool_format: str | None) -> None:
        eos = sorted(text.eos_ids) or None
        self._tokenizer = LLTokenizer(
            text.tokenizer.to_str(), n_vocab=max(vocab_size, text.vocab_size), eos_token=eos
        )
        self._vocab_size = max(vocab_size, text.vocab_size)
        self._tool_format = tool_format
        self._cache: OrderedDict[str, LLMatcher] = OrderedDict()

    def start(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of the output.

        Raises:
            BadRequest: the schema or pattern cannot be compiled; the message says why.
        """
        grammar = self._grammar(constraint)
        compiled = self._cache.get(grammar)
        if compiled is None:
            compiled = LLMatcher(self._tokenizer, grammar, log_level=0)
            if compiled.is_error():
                reason = str(compiled.get_error()).split("\n")[0][:300]
                raise BadRequest(
                    f"The output constraint cannot be compiled: {reason}",
                    param="tool_choice" if constraint.kind == "tool_call" else "response_format",
                    code="invalid_schema",
                )
            self._cache[grammar] = compiled
            if len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return Matcher(compiled.deep_copy(), self._vocab_size)

    def _grammar(self, constraint: Constraint) -> str:
        match constraint.kind:
            case "json_object":
                return _json_grammar({"type": "object"})
            case "json_schema":
                return _json_grammar(constraint.value)
            case "regex":
                return str(LLMatcher.grammar_from_regex(constraint.value))
            case "tool_call":
                return str(
                    llguidance.grammar_from("lark", tool_call_rule(constraint, self._tool_format))
                )


def _json_grammar(schema: dict[str, Any]) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE))


def tool_call_rule(constraint: Constraint, tool_format: str | None) -> str:
    """A Lark rule (llguidance's dialect) for exactly one call, in the model's own format.

    Raises:
        BadRequest: the model's chat template takes no tools.
    """
    if tool_format is None:
        raise BadRequest("This model's chat template takes no tools.", param="tools")
    call = FORMATS[tool_format]
    schema = call.grammar_schema(constraint.value["names"], constraint.value["schemas"])
    schema = {**schema, "x-guidance": JSON_STYLE}
    before, after = (json.dumps(part) if part else "" for part in call.wrap)
    return f"start: {before} body {after}\nbody: %json {json.dumps(schema)}\n"
