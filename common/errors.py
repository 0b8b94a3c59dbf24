"""What can go wrong on behalf of a caller, and the HTTP status each failure means.

    ServingError                    500
    |-- InvalidRequestError         400   the request can never succeed as it is
    |   |-- PayloadTooLargeError    413   ... because it has too many bytes
    |   |-- UnsupportedBodyError    415   ... because its body is encoded
    |   `-- UnfetchableMediaError   422   ... because what its URL names cannot be had
    |-- AuthenticationError         401   no API key, or one that is not known
    |-- ForbiddenError              403   the key may not do this
    |-- ModelNotFoundError          404
    |-- MediaNotFoundError          404   managed media of this id are not there, or no longer
    |-- SlowRequestError            408   the body did not arrive in time
    |-- ConflictError               409   the request contradicts what is known already
    |-- OverloadedError             429   the same request may succeed later
    |-- UnavailableError            503   a part of the service is missing for now
    |-- DeadlineExceededError       504   the caller's own time limit is over
    `-- InsufficientStorageError    507   a store is full until something in it is deleted or expires

Anything else that is raised while serving is a bug and a 500. Messages name the field, the limit and the setting, and
never contain text of a decoder or of another library.
"""


class ServingError(Exception):
    """`param` names the offending field of the request, `code` is a stable machine-readable word.

    `retry_after_s` is when the same request may succeed, if that is known. Only `message` is a positional argument, so
    that the exception survives pickling with its attributes.
    """

    status = 500
    type = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


class InvalidRequestError(ServingError):
    status = 400
    type = "invalid_request_error"


class PayloadTooLargeError(InvalidRequestError):
    status = 413


class UnsupportedBodyError(InvalidRequestError):
    status = 415


class UnfetchableMediaError(InvalidRequestError):
    status = 422


class AuthenticationError(ServingError):
    status = 401
    type = "authentication_error"


class ForbiddenError(ServingError):
    status = 403
    type = "permission_error"


class ModelNotFoundError(ServingError):
    status = 404
    type = "invalid_request_error"


class MediaNotFoundError(ServingError):
    status = 404
    type = "invalid_request_error"


class SlowRequestError(ServingError):
    status = 408
    type = "timeout_error"


class ConflictError(ServingError):
    status = 409
    type = "invalid_request_error"


class OverloadedError(ServingError):
    status = 429
    type = "rate_limit_error"


class UnavailableError(ServingError):
    status = 503
    type = "service_unavailable_error"


class DeadlineExceededError(ServingError):
    status = 504
    type = "timeout_error"


class InsufficientStorageError(ServingError):
    status = 507
    type = "insufficient_storage_error"
