"""What an answer means that is not a success: the HTTP status says little, Slurm's own number nearly everything.

The numbers are those of `slurm/slurm_errno.h`, and the meanings were measured on 22.05, 24.11 and 26.05. Without a
number that says otherwise, a request that changes something may have happened.
"""

from __future__ import annotations

from typing import Final

from controlplane.slurm.errors import (
    SlurmAmbiguous,
    SlurmError,
    SlurmForbidden,
    SlurmRejected,
    SlurmUnreachable,
    foreign_text,
)
from controlplane.slurm.transport import Answer
from controlplane.slurm.wire import read_complaints

INVALID_JOB_ID: Final = 2017  # the only number that says "no such job"
ALREADY_DONE: Final = 2021
JOB_FINISHED: Final = 2084
NOT_PENDING: Final = 2073

_NOT_CONNECTED: Final = frozenset({1001, 1021, 1800})  # slurmrestd did not get through to slurmctld
_NOT_NOW: Final = frozenset({2007, 2027, 2105, 2131})  # table full, standby, submissions disabled: true of now only
_ACCESS: Final = frozenset({1007, 9008, *range(6000, 6100)})
_INTERNAL: Final = 2090  # slurmctld failed half-way: who knows


def judge(answer: Answer, *, changes: bool) -> SlurmError:
    """The error that `answer` amounts to, to be raised by a caller who found no success in it.

    Not for slurmrestd's 404 in plain text, which is about the API version and not about the request.
    """
    complaints = read_complaints(answer)
    numbers = {complaint.number for complaint in complaints if complaint.number is not None}
    said = "; ".join(complaint.text for complaint in complaints) or answer.text
    message = foreign_text(f"HTTP {answer.status}: {said}")
    if answer.status in (401, 511) or numbers & _ACCESS:
        return SlurmForbidden(message)
    if numbers & (_NOT_CONNECTED | _NOT_NOW):
        return SlurmUnreachable(message)
    refusals = sorted(number for number in numbers if _is_refusal(number))
    if refusals:
        return SlurmRejected(message, refusals[0])
    if answer.status in (400, 405, 413, 415, 422) and not numbers:
        return SlurmRejected(message)  # slurmrestd itself could not make sense of the request
    return SlurmAmbiguous(message) if changes else SlurmUnreachable(message)


def _is_refusal(number: int) -> bool:
    """slurmctld (2xxx), a plug-in (8xxx) or slurmrestd's parser (9xxx) looked at the request and said no."""
    return (2000 <= number < 3000 and number != _INTERNAL) or 8000 <= number < 10000
