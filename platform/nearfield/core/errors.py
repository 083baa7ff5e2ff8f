"""The errors a caller can meet, as one tree.

    NearfieldError
    ├── BadRequest 400            the request is wrong; `param` names the field
    │   ├── PayloadTooLarge 413
    │   ├── UnsupportedMedia 415
    │   └── Unprocessable 422
    ├── Unauthenticated 401
    ├── Forbidden 403
    ├── NotFound 404
    ├── Conflict 409
    ├── RateLimited 429           a bound was reached; `retry_after_s` says when to come back
    ├── Cancelled 499             the caller went away
    ├── EngineFailed 500          the model failed on this request
    ├── UpstreamFailed 502        a remote model failed
    ├── Unavailable 503           starting, draining or out of capacity
    └── DeadlineExceeded 504

Each error knows its HTTP status and OpenAI `type`; `nearfield.api` renders it in the
caller's dialect. A message is written for the caller: it names the field and the remedy, and
never carries a stack trace, a path, or anyone else's data.
"""

from __future__ import annotations

from typing import Any, ClassVar


class NearfieldError(Exception):
    """An error that may be shown to a caller.

    Attributes:
        message: one or two sentences naming the field and the remedy.
        param: the request field at fault, dotted (`messages[0].role`), if any.
        code: a stable machine-readable reason (`model_not_found`), if any.
        retry_after_s: when a repeat could succeed, in seconds, if it could.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross the pipe between an engine's process and the replica.
        return (_rebuild, (type(self), self.message, self.param, self.code, self.retry_after_s))


def _rebuild(
    kind: type[NearfieldError],
    message: str,
    param: str | None,
    code: str | None,
    retry_after_s: float | None,
) -> NearfieldError:
    return kind(message, param=param, code=code, retry_after_s=retry_after_s)


class BadRequest(NearfieldError):
    status = 400
    type = "invalid_request_error"


class PayloadTooLarge(BadRequest):
    status = 413
    default_code = "payload_too_large"


class UnsupportedMedia(BadRequest):
    status = 415
    default_code = "unsupported_media_type"


class Unprocessable(BadRequest):
    status = 422


class Unauthenticated(NearfieldError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(NearfieldError):
    status = 403
    type = "permission_error"


class NotFound(NearfieldError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class Conflict(NearfieldError):
    status = 409
    type = "invalid_request_error"


class RateLimited(NearfieldError):
    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"


class Cancelled(NearfieldError):
    status = 499
    type = "request_cancelled"


class EngineFailed(NearfieldError):
    status = 500
    default_code = "engine_failed"


class UpstreamFailed(NearfieldError):
    status = 502
    default_code = "upstream_failed"


class Unavailable(NearfieldError):
    status = 503
    type = "service_unavailable"
    default_code = "unavailable"


class DeadlineExceeded(NearfieldError):
    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"
