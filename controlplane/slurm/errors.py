"""What can go wrong with Slurm, named by what the caller may do next.

    SlurmError
      SlurmUnreachable    certainly nothing happened: ask again later
      SlurmAmbiguous      it may have happened: look it up, never send it again blindly
      SlurmRejected       Slurm answered no: the same request will be refused again
      SlurmForbidden      the token or the user is not accepted: an operator has to act
      SlurmProtocolError  the answer cannot be read: nothing is known

A read changes nothing, so a read that got no usable answer is always `SlurmUnreachable`, never `SlurmAmbiguous`.
No other exception leaves this room because of what a server or a network did.
"""

from __future__ import annotations

import re
from typing import ClassVar

FOREIGN_TEXT_LIMIT = 256
_JSON_WEB_TOKEN = re.compile(r"eyJ[\w-]*(?:\.[\w-]*)*")


class SlurmError(Exception):
    """Slurm could not be asked, did not answer, or said no. Its text is safe to log and to show."""

    outcome: ClassVar[str] = "error"  # the word for metrics


class SlurmUnreachable(SlurmError):
    """Certainly nothing happened. The same call may be made again at any later time."""

    outcome = "unreachable"


class SlurmAmbiguous(SlurmError):
    """The request left and its outcome is not known: it may have happened, or may still happen."""

    outcome = "ambiguous"


class SlurmRejected(SlurmError):
    """Slurm answered no, and nothing happened. `error_number` is Slurm's own number, where it gave one."""

    outcome = "rejected"

    def __init__(self, message: str, error_number: int | None = None) -> None:
        super().__init__(message)
        self.error_number = error_number


class SlurmForbidden(SlurmError):
    """There is no usable token, or Slurm does not accept it. Nothing happened."""

    outcome = "forbidden"


class SlurmProtocolError(SlurmError):
    """What answered cannot be read, or is not a slurmrestd of a known version."""

    outcome = "protocol_error"


def foreign_text(text: str) -> str:
    """`text` from outside, fit to be shown: on one line, at most 256 characters, with anything like a token removed."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return _JSON_WEB_TOKEN.sub("<token>", " ".join(printable.split()))[:FOREIGN_TEXT_LIMIT]
