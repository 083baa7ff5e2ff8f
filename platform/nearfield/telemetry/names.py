"""The name of every span, metric and attribute, in one place.

`gen_ai.*`, `server.*`, `http.*`, `url.*` and `error.type` are OpenTelemetry's semantic conventions
(GenAI and HTTP); what they have no name for is `nearfield.*`. Durations are seconds.
"""

from __future__ import annotations

from typing import Final

SCOPE: Final = "nearfield"

# Spans. The server span is named `METHOD /route`.
SPAN_QUEUE: Final = "queue"  # accepted → first computed
SPAN_PREFILL: Final = "prefill"  # → first token
SPAN_DECODE: Final = "decode"  # → last token
SPAN_COMPUTE: Final = "engine step"  # an embedding's or a tensor request's one forward
SPAN_ATTEMPT: Final = "attempt"  # a gateway's: one try at one endpoint

# Attributes of spans and metrics.
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
REQUEST_STREAM: Final = "gen_ai.request.stream"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
TOKEN_TYPE: Final = "gen_ai.token.type"
ERROR_TYPE: Final = "error.type"
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
URL_PATH: Final = "url.path"
MODEL_VERSION: Final = "nearfield.model.version"
MODEL: Final = "nearfield.model"
REQUEST_ID: Final = "nearfield.request.id"
TENANT: Final = "nearfield.tenant"
PRODUCT: Final = "nearfield.product"
KEY_ID: Final = "nearfield.key.id"
BATCH_SIZE: Final = "nearfield.batch.size"
STEPS: Final = "nearfield.steps"
CACHED_TOKENS: Final = "nearfield.usage.cached_tokens"
GATEWAY: Final = "nearfield.gateway"
REGION: Final = "nearfield.region"
ENDPOINT: Final = "nearfield.endpoint"
REPLICA: Final = "nearfield.replica"
ATTEMPTS: Final = "nearfield.attempts"
ROUTE_WHY: Final = "nearfield.route.why"
ROUTE_REASON: Final = "nearfield.route.reason"
ROUTE_PREDICTED: Final = "nearfield.route.predicted_s"
FIRST_BYTE: Final = "nearfield.first_byte_s"
CODE: Final = "nearfield.code"

PROVIDER_NAME: Final = "nearfield"

# Values of gen_ai.operation.name. The last two have no convention.
CHAT: Final = "chat"
TEXT_COMPLETION: Final = "text_completion"
EMBEDDINGS: Final = "embeddings"
INFER: Final = "infer"
OTHER: Final = "other"

# Values of gen_ai.token.type.
INPUT: Final = "input"
OUTPUT: Final = "output"

# Metrics of a request, recorded once when it ends.
REQUEST_DURATION: Final = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"
TOKENS: Final = "nearfield.tokens"
QUEUE_TIME: Final = "nearfield.queue.time"
BATCH_SIZES: Final = "nearfield.batch.sizes"
ERRORS: Final = "nearfield.errors"

# A gateway's, beside those of a request: of its tries, and of what it could not write down.
CLIENT_DURATION: Final = "gen_ai.client.operation.duration"
CLIENT_TOKENS: Final = "gen_ai.client.token.usage"
RETRIES: Final = "nearfield.retries"
MALFORMED: Final = "nearfield.malformed"
PAGES: Final = "nearfield.pages"
USAGE_WAITING: Final = "nearfield.usage.waiting"
USAGE_WRITTEN: Final = "nearfield.usage.written"
USAGE_LOST: Final = "nearfield.usage.lost"
LOG_LINES_LOST: Final = "nearfield.log.lost"

# Metrics of a moment, read when somebody collects.
RUNNING: Final = "nearfield.requests.running"
WAITING: Final = "nearfield.requests.waiting"
QUEUE_AGE: Final = "nearfield.queue.age"
ENGINE_BATCH: Final = "nearfield.engine.batch_size"
KV_USAGE: Final = "nearfield.engine.kv_usage"
ENGINE_STEPS: Final = "nearfield.engine.steps"
ENGINE_TOKENS: Final = "nearfield.engine.tokens"
ENGINE_CRASHES: Final = "nearfield.engine.crashes"

# What inference gateways (llm-d, Gateway API inference extension) ask a server for, under the
# names they ask by. Prometheus only: OpenTelemetry allows no colon in a name.
VLLM_RUNNING: Final = "vllm:num_requests_running"
VLLM_WAITING: Final = "vllm:num_requests_waiting"
VLLM_KV_USAGE: Final = "vllm:kv_cache_usage_perc"
VLLM_MODEL_LABEL: Final = "model_name"

DURATION_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
TOKEN_BUCKETS_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0,
)  # fmt: skip
BATCH_BUCKETS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
TOKEN_COUNT_BUCKETS: Final = (
    1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0,
    16777216.0, 67108864.0,
)  # fmt: skip
"""As the conventions ask for `gen_ai.client.token.usage`."""
