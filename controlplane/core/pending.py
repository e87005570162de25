"""Why Slurm lets a job wait: each of its reasons in words, and what an operator can do about it.

The codes are those of Slurm's "Job Reason Codes" (22.05 to 25.05) and of `job_reason_string` in its source. Families of
limits are told by their beginning, because there is one code for each resource that can be limited. A code that is not
here is shown as Slurm gave it. docs/pending.md is compared with this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """One reason: `code` as Slurm says it, or the beginning that a family shares, with a star.

    In `remedy`, SET and JOBID stand for what it is about.
    """

    code: str
    meaning: str
    remedy: str

    @property
    def is_family(self) -> bool:
        return self.code.endswith("*")

    def remedy_for(self, replica_set: str, job_id: int) -> str:
        return self.remedy.replace("SET", replica_set).replace("JOBID", str(job_id))


_WAIT = "Wait, or want fewer with `controlplane scale SET`."
_LIMIT = "Wait until its jobs end, or ask an administrator to raise the limit (`sacctmgr show assoc`)."
_QOS_LIMIT = "Wait until its jobs end, or ask an administrator to raise the limit (`sacctmgr show qos`)."
_ADMIN = "Ask an administrator; the replica waits and starts by itself."
_SPEC = "Correct the set's `slurm` section and apply it; replicas of the old spec are replaced."
_AUTOMATIC = "Nothing: it passes by itself."
_RELEASE = "Look for `release of ... failed` in the log; each round of the control plane tries again."
_END = "Look at `scontrol show job JOBID`, then cancel the replica: it is replaced."

WAITING = (
    Waiting("None", "Slurm has not looked at the job yet.", _AUTOMATIC),
    Waiting("Resources", "It is next in line, and what it asks for is in use.", _WAIT),
    Waiting("Priority", "Jobs with a higher priority come first.", _WAIT),
    Waiting("Dependency", "It waits for another job.", _END),
    Waiting("DependencyNeverSatisfied", "It waits for a job that can never end as it has to.", _END),
    Waiting("BeginTime", "Its earliest start is still to come, as for two minutes after a requeue.", _AUTOMATIC),
    Waiting("Cleaning", "It was requeued, and its former run is still being cleaned up.", _AUTOMATIC),
    Waiting("Prolog", "The prolog runs on its nodes.", _AUTOMATIC),
    Waiting("SchedDefer", "Slurm defers starting jobs at submit time.", _AUTOMATIC),
    Waiting("WaitingForScheduling", "Slurm has not come to it yet.", _AUTOMATIC),
    Waiting("JobHeldUser", "It is held, as every job of ours is when it is submitted, and not yet released.", _RELEASE),
    Waiting("JobHeldAdmin", "An administrator holds it; only an administrator can release it.", _ADMIN),
    Waiting("JobHoldMaxRequeue", "It was requeued too often, and is held.", _END),
    Waiting("launch_failed_requeued_held", "Its start failed on a node, and it was requeued and held.", _END),
    Waiting(
        "JobLaunchFailure", "Its start failed: a bad node, a missing directory, or a file that cannot be written.", _END
    ),
    Waiting(
        "ReqNodeNotAvail",
        "Nodes that it needs are down, drained or reserved.",
        "Look at `sinfo -R` and `scontrol show reservation`; shorten `time_limit_seconds` if maintenance is near.",
    ),
    Waiting("NodeDown", "A node that it needs is down.", "Look at `sinfo -R`; resume the node, or wait."),
    Waiting("FrontEndDown", "No front end is up to run it.", _ADMIN),
    Waiting("PowerNotAvail", "The cluster's power limit leaves nothing for it.", _WAIT),
    Waiting("PowerReserved", "The power that it needs is reserved.", _WAIT),
    Waiting("MaxPoweredNodes", "As many nodes are powered as may be.", _WAIT),
    Waiting("Reservation", "It waits for its reservation to begin.", "Look at `scontrol show reservation`."),
    Waiting("ReservationDeleted", "Its reservation is gone.", _SPEC),
    Waiting("PartitionDown", "Its partition takes jobs, and starts none.", "Look at `sinfo`; wait, or choose another."),
    Waiting("PartitionInactive", "Its partition is inactive.", "Look at `sinfo`; wait, or choose another."),
    Waiting("PartitionNodeLimit", "It asks for more nodes than its partition gives, or they are down.", _SPEC),
    Waiting(
        "PartitionTimeLimit",
        "It asks for more time than its partition gives.",
        "Lower `time_limit_seconds`, or choose another partition, and apply the set.",
    ),
    Waiting("AccountNotAllowed", "Its account may not use the partition.", _SPEC),
    Waiting("BadConstraints", "No node can ever satisfy its constraints.", _SPEC),
    Waiting("Constraints", "No node satisfies its constraints now.", _SPEC),
    Waiting("InvalidAccount", "Its account does not exist, or is not the user's.", _SPEC),
    Waiting("InvalidQOS", "Its QOS does not exist, or is not the user's.", _SPEC),
    Waiting("QOSNotAllowed", "Its account or partition may not use the QOS.", _SPEC),
    Waiting("Licenses", "Licences that it needs are in use.", _WAIT),
    Waiting("DeadLine", "It cannot end before its deadline any more.", _END),
    Waiting("SystemFailure", "Slurm itself failed: its files, its network, or the like.", _ADMIN),
    Waiting("AccountingPolicy", "A limit of accounting keeps it back, and Slurm does not say which.", _LIMIT),
    Waiting("QOSUsageThreshold", "The usage is beyond what the QOS allows.", _QOS_LIMIT),
    Waiting("Association*", "A limit of its association (user, account, partition) is reached.", _LIMIT),
    Waiting("AssocGrp*", "All jobs of its association together have reached a limit.", _LIMIT),
    Waiting(
        "AssocMax*",
        "It asks for more than one job of its association may have, or there are as many as may be.",
        "Ask for less in the set's `slurm` section, or ask an administrator (`sacctmgr show assoc`).",
    ),
    Waiting("QOSGrp*", "All jobs of its QOS together have reached a limit.", _QOS_LIMIT),
    Waiting(
        "QOSMax*",
        "It asks for more than its QOS gives to one job, user or account, or they have it already.",
        "Wait, ask for less in the set's `slurm` section, or ask an administrator (`sacctmgr show qos`).",
    ),
    Waiting("QOSMin*", "It asks for less than its QOS wants a job to use.", _SPEC),
    Waiting("QOS*", "A limit of its QOS is reached.", _QOS_LIMIT),
    Waiting("Max*", "Its account has as much as the QOS gives to one.", _QOS_LIMIT),
    Waiting("BurstBuffer*", "Its burst buffer is not ready, or failed.", _ADMIN),
    Waiting("FedJobLock", "The federation's clusters have not agreed yet on who runs it.", _AUTOMATIC),
)

_BY_CODE = {one.code: one for one in WAITING if not one.is_family}
_FAMILIES = sorted((one for one in WAITING if one.is_family), key=lambda one: -len(one.code))
UNHEARD_OF = Waiting(
    "",
    "Slurm gives a reason that is not known here.",
    "Look it up in Slurm's list of job reason codes, and at `scontrol show job JOBID`.",
)


def word_of(state_reason: str) -> str:
    """The code alone: some are followed by the names of nodes, as `ReqNodeNotAvail, UnavailableNodes:n[1-4]`."""
    match = re.match(r"\w{1,64}", state_reason)
    return match[0] if match else "None"


def explain(state_reason: str) -> Waiting:
    """What Slurm's reason means. The result's `code` is the table's: a family's for its members, "" for the unknown."""
    word = word_of(state_reason)
    if word in _BY_CODE:
        return _BY_CODE[word]
    return next((one for one in _FAMILIES if word.startswith(one.code[:-1])), UNHEARD_OF)
