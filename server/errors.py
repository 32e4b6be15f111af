"""All errors that this project raises on purpose, as one tree.

PolypeftError                           500  a bug or failure of ours, unless a subclass says otherwise
├── InvalidRequest                      400  the request cannot be parsed
│   ├── ContextTooLong                  400  prompt and max_tokens exceed the model's context
│   └── InvalidField                    400  one field has an invalid value
│       └── InvalidAdapter              400  an uploaded adapter that cannot be served on this base
├── Unauthenticated                     401  no key, or an unknown one
├── Forbidden                           403  a valid key without the right to this route
├── NotFound                            404  unknown, or another tenant's: the same answer
│   └── ModelNotFound                   404  ... a base or an adapter, with OpenAI's code
├── HeadTimeout                         408  the head of the request did not arrive in time
├── Conflict                            409  the object exists, or has changed meanwhile
├── PreconditionFailed                  412  If-Match or If-None-Match does not hold
├── TooLarge                            413  more bytes than the limit
├── UrlTooLong                          414  a longer URL than the limit
├── UnsupportedMedia                    415  a kind of file that is not accepted
├── QuotaExceeded                       429  a limit of the tenant
│   ├── TenantQueueFull                 429  ... on its rows in the engine
│   └── RateLimited                     429  ... on requests or tokens a minute, or on requests at once
├── HeadTooLarge                        431  more header fields or header bytes than the limit
├── Unavailable                         503  overloaded, draining, or a part is down: try again
│   ├── QueueFull                       503  the engine has all the rows that it takes
│   ├── DeadlineUnreachable             503  the wait, by the measured rates, is longer than the deadline
│   ├── EngineLost                      503  the engine ended during this request
│   └── StoreError                      503  the object store or Valkey did not answer
│       ├── CorruptObject               503  ... or returned bytes that differ from those stored
│       └── InsufficientStorage         507  ... or cannot write: the disk is full or read-only
├── DeadlineExceeded                    504  the request's deadline has passed
├── NonFinite                           500  the model produced NaN or Inf for this row
└── StartupError                             serve cannot start: wrong model, wrong setting
    └── UnsupportedModel                     ... the base needs what the engine does not implement

The API turns each into OpenAI's error object: {"error": {"message", "type", "param", "code"}}. `code` is
stable, and an error crosses processes by it (`error_from_code`). A message is one sentence that names the
field, the value and the limit; it never holds a path, a key or a traceback.
"""

import errno
from itertools import islice
from typing import ClassVar

DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class PolypeftError(Exception):
    """Root of the tree. `param` names the invalid field; `code` is stable and machine-readable."""

    status: ClassVar[int] = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code


class InvalidRequest(PolypeftError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class InvalidField(InvalidRequest):
    code = "invalid_value"


class InvalidAdapter(InvalidField):
    code = "invalid_adapter"


class Unauthenticated(PolypeftError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(PolypeftError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(PolypeftError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class HeadTimeout(PolypeftError):
    status = 408
    type = "invalid_request_error"
    code = "head_timeout"


class Conflict(PolypeftError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class PreconditionFailed(PolypeftError):
    status = 412
    type = "invalid_request_error"
    code = "precondition_failed"


class TooLarge(PolypeftError):
    status = 413
    type = "invalid_request_error"
    code = "too_large"


class UrlTooLong(PolypeftError):
    status = 414
    type = "invalid_request_error"
    code = "url_too_long"


class UnsupportedMedia(PolypeftError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QuotaExceeded(PolypeftError):
    status = 429
    type = "rate_limit_error"
    code = "quota_exceeded"


class TenantQueueFull(QuotaExceeded):
    code = "tenant_queue_full"


class RateLimited(QuotaExceeded):
    """`type` says of what, as OpenAI's does. `wait`: seconds until it would be admitted; None: never."""

    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "requests",
        wait: float | None = 1.0,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.type = kind
        self.wait = wait


class HeadTooLarge(PolypeftError):
    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class Unavailable(PolypeftError):
    """`wait`: seconds after which it is worth another try."""

    status = 503
    type = "server_error"
    code = "unavailable"
    wait: float = 1.0


class QueueFull(Unavailable):
    code = "queue_full"


class DeadlineUnreachable(Unavailable):
    code = "deadline_unreachable"


class EngineLost(Unavailable):
    code = "engine_lost"


class StoreError(Unavailable):
    code = "store_unavailable"


class CorruptObject(StoreError):
    code = "corrupt_object"


class InsufficientStorage(StoreError):
    status = 507
    code = "insufficient_storage"

    def __init__(
        self,
        message: str = "The server has no room to store this at present; try again later.",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)


class DeadlineExceeded(PolypeftError):
    status = 504
    type = "server_error"
    code = "deadline_exceeded"


class NonFinite(PolypeftError):
    code = "non_finite_logits"


class StartupError(PolypeftError):
    code = "startup_failed"


class UnsupportedModel(StartupError):
    """Its message is a reason, from which base_model/compatibility.py makes a sentence."""

    code = "unsupported_model"


def disk_error(error: BaseException) -> InsufficientStorage | None:
    """The InsufficientStorage for an OSError of a full or read-only disk; None for any other error."""
    full = isinstance(error, OSError) and error.errno in DISK_ERRNOS
    return InsufficientStorage() if full else None


def error_from_code(code: str, message: str, param: str | None = None) -> PolypeftError:
    """An error from another process, of the class that has this code; PolypeftError for an unknown code."""
    found = next((c for c in _tree(PolypeftError) if c.code == code), PolypeftError)
    return found(message, param=param, code=code)


def _tree(root: type[PolypeftError]) -> list[type[PolypeftError]]:
    return [root, *(c for sub in root.__subclasses__() for c in _tree(sub))]


def shown(value: object, limit: int = 64) -> str:
    """A caller's value for a message: as ASCII, escaped, in quotes if it is text, cut to `limit` characters.

    Takes the same time however large or nested the value is.
    """
    text = ascii(_head(value, limit + 1, 2))
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def _head(value: object, length: int, depth: int) -> object:
    """The part of the value that the first `length` characters of its ascii() show.

    Containers nested deeper than `depth` become "...".
    """
    if isinstance(value, str):
        return value[:length]
    if isinstance(value, list | dict) and depth == 0:
        return "..."
    items = length // 3 + 1  # an item takes three characters at least
    if isinstance(value, list):
        return [_head(item, length, depth - 1) for item in value[:items]]
    if isinstance(value, dict):
        return {_head(k, length, 0): _head(v, length, depth - 1) for k, v in islice(value.items(), items)}
    return value
