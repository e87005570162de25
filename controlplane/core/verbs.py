"""What an operator's word to one replica means, by the phase that finds it there.

| phase      | drain                        | undrain   | cancel   |
|------------|------------------------------|-----------|----------|
| PENDING    | ENDED                        | nothing   | ENDED    |
| SUBMITTING | refused: no job id yet       | nothing   | refused  |
| QUEUED     | STOPPING                     | nothing   | STOPPING |
| RUNNING    | DRAINING, until its deadline | nothing   | STOPPING |
| DRAINING   | nothing                      | RUNNING   | STOPPING |
| STOPPING   | nothing                      | refused   | nothing  |
| ENDED      | nothing                      | refused   | nothing  |

"Nothing": the replica already is as asked. Saying a word again is harmless, therefore.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from controlplane.core.types import Move, Phase, Reason, Replica, seconds


class Verb(StrEnum):
    DRAIN = "drain"
    UNDRAIN = "undrain"
    CANCEL = "cancel"


class VerbRefused(Exception):
    """The replica is where the word cannot be obeyed; the message says what to do."""


_REASONS = {Verb.DRAIN: Reason.DRAINED_BY_OPERATOR, Verb.CANCEL: Reason.CANCELLED_BY_OPERATOR}


def interpret(verb: Verb, replica: Replica, *, actor: str, now: datetime, reason: str | None = None) -> Move | None:
    """The one step that the verb means now; None when nothing needs to be done. Raises VerbRefused."""
    message = f"{verb} by {actor}" + (f" ({reason})" if reason else "")
    match verb, replica.phase:
        case Verb.UNDRAIN, Phase.DRAINING:
            return Move(replica, Phase.RUNNING, message=message)
        case Verb.UNDRAIN, Phase.STOPPING | Phase.ENDED:
            raise VerbRefused(f"{replica.name} is {replica.phase}: it is too late to undo its drain")
        case Verb.UNDRAIN, _:
            return None
        case _, Phase.STOPPING | Phase.ENDED:
            return None
        case _, Phase.SUBMITTING:
            raise VerbRefused(f"{replica.name} is being submitted and its job id is not known yet: try again shortly")
        case Verb.DRAIN, Phase.DRAINING:
            return None
        case Verb.DRAIN, Phase.RUNNING:
            deadline = now + seconds(replica.spec.drain_timeout_seconds)
            return Move(replica, Phase.DRAINING, _REASONS[verb], message, drain_deadline=deadline)
        case _, Phase.PENDING:
            return Move(replica, Phase.ENDED, _REASONS[verb], message)
        case _:
            return Move(replica, Phase.STOPPING, _REASONS[verb], message)
