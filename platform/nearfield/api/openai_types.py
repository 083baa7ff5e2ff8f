"""OpenAI's request and response bodies, strictly.

Requests: an unknown field is refused, a field that cannot change the answer is taken and ignored
(`user`, `store`, ...), one that would change it and is not supported is refused by name. What
numbers may be follows OpenAI's documentation; `top_k`, `min_p`, `repetition_penalty`,
`ignore_eos` and `chat_template_kwargs` are the extensions that vLLM's users know.

Responses: used for the OpenAPI document; rendering writes JSON directly.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

MAX_CHOICES = 128
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_INPUTS = 2048
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_TOKENS = 1_000_000

JsonObject = dict[str, Any]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(strict=True)]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StreamOptions(RequestBody):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class SamplingBody(RequestBody):
    """What chat and completions share."""

    model: StrictStr = Field(min_length=1, max_length=256)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: JsonObject | None = None
    user: StrictStr | None = None
    # extensions
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    ignore_eos: StrictBool | None = None


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


MessageContent = StrictStr | list[TextPart]


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
    tool_calls: list[MessageToolCall] | None = None
    # what our own answers (and OpenAI's) carry, so that they can be sent back as they came
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
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

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS)
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
    reasoning_effort: StrictStr | None = None
    verbosity: StrictStr | None = None
    # refused unless they ask for what is done anyway
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: StrictStr | list[StrictStr] | list[TokenId] | list[list[TokenId]]
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class EmbeddingBody(RequestBody):
    """`POST /v1/embeddings`."""

    model: StrictStr = Field(min_length=1, max_length=256)
    input: StrictStr | list[StrictStr] | list[TokenId] | list[list[TokenId]]
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
