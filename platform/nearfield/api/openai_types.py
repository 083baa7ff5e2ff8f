"""OpenAI's request and response bodies, strictly.

Requests: an unknown field is refused, a field that cannot change the answer is taken and ignored
(`user`, `store`, ...), one that would change it and is not supported is refused by name. What
numbers may be follows OpenAI's documentation; `top_k`, `min_p`, `repetition_penalty`,
`ignore_eos` and `chat_template_kwargs` are the extensions that vLLM's users know.

Responses: used for the OpenAPI document; rendering writes JSON directly.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from nearfield.api.events import Sampling
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_FIELDS = 64
MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOLS = 128
MAX_INPUTS = 2048
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_TOKENS = 2**20
MAX_SCHEMA_BYTES = 256 * 1024

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list whose first wrong item is the only one reported: a body of millions of wrong ones must
not become millions of reports."""

JsonObject = dict[str, Any]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
ModelName = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Tokens = Annotated[Items[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
TextOrTokens = (
    StrictStr
    | Annotated[Items[StrictStr], Field(max_length=MAX_INPUTS)]
    | Tokens
    | Annotated[Items[Tokens], Field(max_length=MAX_INPUTS)]
)


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Each unknown field would be reported: not a million of them."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "an object here has at most {most} fields", {"most": MAX_FIELDS}
            )
        return data


class StreamOptions(RequestBody):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


Stop = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class SamplingFields(RequestBody):
    """How tokens are chosen, by the names that every API here has for it."""

    max_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[Items[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    # extensions
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    ignore_eos: StrictBool | None = None

    def sampling(self, *, max_tokens: int | None = None, logprobs: int | None = None) -> Sampling:
        """As the engine takes it. `max_tokens` goes before the field of that name."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens or self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            stop=tuple(stops),
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
        )


class SamplingBody(SamplingFields):
    """What chat and completions share."""

    model: ModelName
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    logit_bias: JsonObject | None = None
    user: StrictStr | None = None


class GenerateParameters(SamplingFields):
    """`parameters` of the Open Inference Protocol's generate."""

    stream: StrictBool | None = None  # as Triton's clients send it; the path says which


class TextPart(RequestBody):
    type: Literal["text"]
    text: StrictStr


class FunctionCall(RequestBody):
    name: FunctionName
    arguments: StrictStr


class MessageToolCall(RequestBody):
    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall
    index: StrictInt | None = None


MessageContent = StrictStr | Annotated[Items[TextPart], Field(max_length=MAX_PARTS)]


class SystemMessage(RequestBody):
    role: Literal["system", "developer"]
    content: MessageContent
    name: StrictStr | None = None


class UserMessage(RequestBody):
    role: Literal["user"]
    content: MessageContent
    name: StrictStr | None = None


class AssistantMessage(RequestBody):
    role: Literal["assistant"]
    content: MessageContent | None = None
    name: StrictStr | None = None
    refusal: StrictStr | None = None
    tool_calls: Items[MessageToolCall] | None = Field(None, max_length=MAX_TOOLS)
    # what our own answers (and OpenAI's) carry, so that they can be sent back as they came
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None  # never looked at
    reasoning_content: StrictStr | None = None


class ToolMessage(RequestBody):
    role: Literal["tool"]
    content: MessageContent
    tool_call_id: StrictStr
    name: StrictStr | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionDefinition(RequestBody):
    name: FunctionName
    description: StrictStr | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None


class ToolDefinition(RequestBody):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestBody):
    name: FunctionName


class NamedToolChoice(RequestBody):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(RequestBody):
    name: StrictStr = Field(max_length=64)
    description: StrictStr | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class TextFormat(RequestBody):
    type: Literal["text"]


class JsonObjectFormat(RequestBody):
    type: Literal["json_object"]


class JsonSchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: Items[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Items[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    chat_template_kwargs: JsonObject | None = None
    # taken and ignored: none of these changes what a model here would answer
    parallel_tool_calls: StrictBool | None = None
    store: StrictBool | None = None
    metadata: JsonObject | None = None
    service_tier: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    prompt_cache_options: JsonObject | None = None
    reasoning_effort: StrictStr | None = None
    verbosity: StrictStr | None = None
    prediction: JsonObject | None = None
    # refused unless they ask for what is done anyway
    modalities: Items[Literal["text"]] | None = None
    audio: None = None
    moderation: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: TextOrTokens
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # refused unless they ask for what is done anyway
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: Literal[""] | None = None


class EmbeddingBody(RequestBody):
    """`POST /v1/embeddings`."""

    model: ModelName
    input: TextOrTokens
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    user: StrictStr | None = None


# ---- responses ---------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: JsonObject | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob] | None
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[JsonObject] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class EmbeddingItem(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class ModelItem(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelItem]
