"""Job errors for causes other than the job's data, worded for the tenant: no path, no traceback."""

import signal

from server.errors import PolypeftError
from server.finetune.jobs.job import JobError

INTERNAL = JobError("internal_error", "The training failed for an internal error; the operator's log has it.")
OUT_OF_MEMORY = JobError(
    "out_of_memory", "The training needs more memory than there is; lower batch_size or max_tokens."
)
DISK_FULL = JobError(
    "insufficient_storage", "The training's worker has no room left; the job is tried again."
)
STORES_UNAVAILABLE = JobError(
    "store_unavailable", "The stores did not answer for too long; the job is tried again."
)


def too_long(seconds: int) -> JobError:
    return JobError("time_limit", f"The training took longer than its max_seconds, {seconds}.")


def too_large(limit: int) -> JobError:
    return JobError("disk_limit", f"The training filled more than {limit} bytes of its worker's disk.")


def refused(error: PolypeftError) -> JobError:
    """A refusal as a job error, with its own code and message."""
    return JobError(error.code, error.message, error.param)


def crashed(status: int, out_of_memory: bool) -> JobError:
    """The error of a training process that died.

    `status` is its exit status as subprocess has it; `out_of_memory`: the kernel's OOM killer was active.
    """
    if status == -signal.SIGKILL and out_of_memory:
        return OUT_OF_MEMORY
    return JobError("worker_crashed", f"The training process {describe_exit(status)} before it was done.")


def describe_exit(status: int) -> str:
    """An exit status in words: "ended with status 1", "was ended by SIGKILL"."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
