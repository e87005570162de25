"""What must never be seen, whatever happens: looked for in the database and in Slurm itself, after every step.

The numbers are those of the invariants:

1. At most one live Slurm job per replica name, ever; a job runs only once the database knows its id.
2. No plan, whole or torn, makes more exist than the bounds allow: of those that are to stay max, of all that live max
   and surge. A replica whose walltime ends and its successor count once; what is on a drained node counts not as to
   stay. Nobody has two successors, and none is made for what has not served, or is a successor in waiting itself.
3. Replayed, permuted or dropped webhooks change when, not where, the world settles.
4. Blindness is no reason to submit, to cancel, to give a job up, or to shrink.
5. What may have been given requests is not cancelled before it was drained, unless an operator forces it.
6. No request in flight is cut by a scale-down, a roll or a replacement before the drain's deadline.
7. ENDED is final; a constant count is reached in a bounded number of rounds.

And nothing is ever cancelled, or released, that is not ours; no job is submitted or released that could start on a node
which was drained when the round began, or reach into maintenance that its submitter knew of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.rows import dict_row

from controlplane.core.held_requests import GOOD_FOR
from tests.sim.grafana import Grafana
from tests.sim.product import OPERATOR, ORPHAN_GRACE, STALE_AFTER
from tests.sim.slurm import NODES, US, Engine, Job, Slurm
from tests.sim.steps import Fate, Process

Row = dict[str, Any]
_EXISTING = ("PENDING", "SUBMITTING", "QUEUED", "RUNNING")
_STEPS = {
    (None, "PENDING"),
    ("PENDING", "SUBMITTING"),
    ("PENDING", "QUEUED"),
    ("PENDING", "ENDED"),
    ("SUBMITTING", "PENDING"),
    ("SUBMITTING", "QUEUED"),
    ("SUBMITTING", "ENDED"),
    ("QUEUED", "RUNNING"),
    ("QUEUED", "STOPPING"),
    ("QUEUED", "ENDED"),
    ("RUNNING", "QUEUED"),
    ("RUNNING", "DRAINING"),
    ("RUNNING", "STOPPING"),
    ("RUNNING", "ENDED"),
    ("DRAINING", "RUNNING"),
    ("DRAINING", "STOPPING"),
    ("DRAINING", "ENDED"),
    ("STOPPING", "ENDED"),
}


class Broken(AssertionError):
    """An invariant does not hold."""


class Watch:
    """Looks at everything, by a connection of its own, and raises `Broken`."""

    def __init__(
        self,
        url: str,
        *,
        slurm: Slurm,
        grafana: Grafana,
        clock: Callable[[], datetime],
        instance_id: str,
        submit_grace: timedelta,
    ) -> None:
        self._connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)
        self._slurm = slurm
        self._grafana = grafana
        self._clock = clock
        self._instance_id = instance_id
        self._submit_grace = submit_grace
        self._submits: Counter[str] = Counter()  # requests made up, by name
        self._last_submit_failed: dict[str, bool] = {}  # by name: certainly, or it was not even sent
        self._steps_seen: set[tuple[int, int]] = set()
        self._ended: dict[str, Row] = {}
        self._last_decision = 0
        self._drained_since: dict[str, datetime] = {}  # nodes, and when a mark that is certainly in force was seen
        self.held_told_at: Callable[[], datetime | None] = lambda: None
        self.sees_stale_list: Callable[[], bool] = lambda: False
        self.told: Callable[[str], None] = lambda words: None

    def close(self) -> None:
        self._connection.close()

    def rows(self, query: str, parameters: Iterable[Any] = ()) -> list[Row]:
        return self._connection.execute(query, tuple(parameters)).fetchall()

    def replica(self, name: str) -> Row | None:
        found = self.rows("SELECT * FROM replicas WHERE name = %s", [name])
        return found[0] if found else None

    # --- as it is asked for --------------------------------------------------------------------------------

    def on_request(self, process: Process, method: str, path: str, name: str | None, content: bytes) -> None:
        """A request has reached slurmrestd, and nothing was done about it yet."""
        if method == "GET":
            return
        if not process.has_seen_jobs:
            raise Broken(f"4: {method} {path} in a round of {process.name} that had no complete list of jobs")
        if path.endswith("/submit"):
            assert name is not None
            self._on_submit(name)
            self._check_place(process, *self._slurm.asked_for(content), name)
            return
        job = self._slurm.jobs.get(int(path.rsplit("/", 1)[1]))
        if job is None or job.is_over:
            return
        if job.user != US or job.comment != f"{job.name} {self._instance_id}":
            raise Broken(f"{method} of job {job.job_id}, which is {job.name} of {job.user} and not ours")
        if method == "DELETE":
            self._on_cancel(job)
        elif b"hold" in content and job.state == "PENDING":
            self._check_place(process, job.told_excluded, None, job.name)

    def _check_place(self, process: Process, excluded: frozenset[str], limit: timedelta | None, name: str) -> None:
        """Of a job that is submitted with this limit, or released."""
        began = process.round_began
        assert began is not None
        drained = {node for node, since in self._drained_since.items() if since <= began}
        if not drained <= excluded:
            raise Broken(f"{name} may start on {', '.join(sorted(drained - excluded))}, which was drained before")
        if limit is None:
            return
        if excluded >= NODES.keys():
            raise Broken(f"{name} was submitted, and may start nowhere")
        known = [one for one in process.calendar if one.ends_at > began]
        firsts = [min((one.starts_at for one in known if node in one.nodes), default=None) for node in NODES]
        closes_at = max((at for at in firsts if at is not None), default=began)
        if None not in firsts and began + limit > closes_at:
            raise Broken(f"{name} asks for {limit}, which reaches into maintenance that begins at {closes_at:%H:%M:%S}")

    def note_marks(self) -> None:
        """Those are certainly in force that operators made, and an alert's if it is the only one."""
        marks = self.rows("SELECT node, cause FROM nodes WHERE cleared_at IS NULL")
        is_alone = len({mark["node"] for mark in marks}) == 1
        drained = {
            mark["node"] for mark in marks if mark["cause"] == "operator" or (mark["cause"] == "alert" and is_alone)
        }
        self._drained_since = {node: self._drained_since.get(node, self._clock()) for node in drained}

    def on_submit_composed(self, name: str) -> None:
        self._last_submit_failed[name] = False

    def on_submit_failed(self, name: str) -> None:
        """Certainly, as its sender was told."""
        self._last_submit_failed[name] = True

    def _on_submit(self, name: str) -> None:
        self._submits[name] += 1
        [row] = self.rows(
            "SELECT count(*) AS intents FROM replica_history h JOIN replicas r ON r.id = h.replica_id "
            "WHERE r.name = %s AND h.to_phase = 'SUBMITTING'",
            [name],
        )
        if self._submits[name] > row["intents"]:
            raise Broken(f"1: {name} was sent {self._submits[name]} times for {row['intents']} intents")

    def _on_cancel(self, job: Job) -> None:
        row = self.replica(job.name)
        if row is None:
            if self._clock() - job.submitted_at < ORPHAN_GRACE:
                raise Broken(f"1: orphan {job.job_id} {job.name} was cancelled inside its grace time")
            return
        is_twin = row["slurm_job_id"] not in (None, job.job_id)
        if not is_twin and row["phase"] not in ("STOPPING", "ENDED"):
            raise Broken(f"5: job {job.job_id} of {job.name} was cancelled while that is {row['phase']}")
        self._check_streams(job, row)

    def _check_streams(self, job: Job | None, row: Row) -> None:
        """May this job be cancelled, for all the requests that are in flight there?"""
        engine = self._slurm.engine_of(job) if job is not None and job.state == "RUNNING" else None
        if engine is not None and engine.dies_at is None and engine.in_flight and not self._may_cut(row):
            raise Broken(f"6: {engine.in_flight} requests of {row['name']} are cut: {row['reason']}, {row['message']}")

    def _may_cut(self, row: Row) -> bool:
        if row["drain_deadline"] is not None and row["drain_deadline"] <= self._clock():
            return True
        forced = (
            "SELECT count(*) AS n FROM replica_history WHERE replica_id = %s AND actor = %s AND to_phase = 'STOPPING'"
        )
        if self.rows(forced, [row["id"], OPERATOR])[0]["n"]:
            return True
        # Slurm showed the job as over, or did not know it, and then it came back to life
        return bool(row["phase"] == "ENDED")

    def on_start(self, engine: Engine) -> None:
        """A process has just been started for a job."""
        row = self.replica(engine.name)
        if row is None or row["slurm_job_id"] != engine.job_id:
            raise Broken(f"1: job {engine.job_id} of {engine.name} runs, and the database does not know its id")

    # --- after a step --------------------------------------------------------------------------------------

    def check_slurm(self) -> None:
        alive: dict[str, set[int]] = {}
        for engine in self._slurm.engines:
            alive.setdefault(engine.name, set()).add(engine.job_id)
        for job in self._slurm.jobs.values():
            if job.is_ours and job.may_run:
                alive.setdefault(job.name, set()).add(job.job_id)
        for name, ids in alive.items():
            if len(ids) > 1:
                raise Broken(f"1: {name} lives more than once: jobs {sorted(ids)}")

    def check_replicas(self) -> None:
        replicas = {row["id"]: row for row in self.rows("SELECT * FROM replicas")}
        for name, before in self._ended.items():
            if replicas.get(before["id"]) != before:
                raise Broken(f"7: {name} had ended and was changed")
        steps = self.rows("SELECT * FROM replica_history ORDER BY at, replica_id, version")
        new = [one for one in steps if (one["replica_id"], one["version"]) not in self._steps_seen]
        for step in new:
            self._steps_seen.add((step["replica_id"], step["version"]))
            self._check_step(step, replicas[step["replica_id"]], steps)
        for step in new:
            if _adds_one(step):
                self._check_bounds(step, replicas[step["replica_id"]], replicas.values())
            if step["from_phase"] is None and replicas[step["replica_id"]]["succeeds"] is not None:
                self._check_successor(step, replicas[step["replica_id"]], replicas)
        self._ended |= {row["name"]: row for row in replicas.values() if row["phase"] == "ENDED"}

    def check_decisions(self) -> None:
        for decision in self.rows("SELECT * FROM decisions WHERE id > %s ORDER BY id", [self._last_decision]):
            self._last_decision = decision["id"]
            self._check_decision(decision)

    def _check_step(self, step: Row, replica: Row, steps: list[Row]) -> None:
        self.told(_words(replica["name"], step))
        name, by_operator = replica["name"], step["actor"] == OPERATOR
        here = (step["from_phase"], step["to_phase"])
        if here not in _STEPS:
            raise Broken(f"7: {name} went {here}")
        if here[1] == "SUBMITTING":
            self._last_submit_failed[name] = True  # nothing was sent yet
        if here == ("RUNNING", "STOPPING") and not by_operator:
            raise Broken(f"5: {name} went from RUNNING to STOPPING without a drain")
        if here == ("DRAINING", "STOPPING"):
            self._check_streams(self._slurm.jobs.get(step["slurm_job_id"]), replica)
        if step["reason"] == "LOST" and step["to_phase"] == "ENDED" and here[0] in ("QUEUED", "RUNNING"):
            job = self._slurm.jobs.get(step["slurm_job_id"])
            is_there = job is not None and job.is_ours and job.name == name and not job.is_over
            if is_there and not self.sees_stale_list():
                raise Broken(f"4: {name} was given up as LOST while job {step['slurm_job_id']} is there")
        if here == ("SUBMITTING", "PENDING") and not self._last_submit_failed.get(name, False):
            asked = [
                one for one in steps if one["replica_id"] == step["replica_id"] and one["to_phase"] == "SUBMITTING"
            ]
            since = max(one["at"] for one in asked if one["version"] < step["version"])
            if step["at"] - since < self._submit_grace:
                raise Broken(f"1: {name} may be sent again {step['at'] - since} after an answer that was lost")

    def _check_bounds(self, step: Row, replica: Row, replicas: Iterable[Row]) -> None:
        [one] = self.rows("SELECT * FROM replica_sets WHERE name = %s", [replica["replica_set"]])
        own = [row for row in replicas if row["replica_set"] == one["name"] and row["phase"] != "ENDED"]
        followed = {row["succeeds"] for row in own if _exists(row)}
        current = {
            row["id"]
            for row in own
            if _exists(row) and row["spec_hash"] == one["spec_hash"] and row["id"] not in followed
        }
        if len(current) > one["max_replicas"]:
            current -= self._on_drained_nodes()
        if len(current) > one["max_replicas"]:
            raise Broken(f"2: {len(current)} replicas of {one['name']} exist, and max is {one['max_replicas']}")
        if step["from_phase"] is None and len(own) > one["max_replicas"] + one["spec"]["surge"]:
            raise Broken(f"2: {len(own)} replicas of {one['name']} live, above max and surge")

    def _on_drained_nodes(self) -> set[int]:
        found = self.rows(
            "SELECT r.id FROM replicas r JOIN slurm_jobs j ON (j.replica_id, j.job_id) = (r.id, r.slurm_job_id) "
            "JOIN nodes n ON n.node = j.nodes WHERE n.cause <> 'failures' AND n.cleared_at IS NULL"
        )
        return {row["id"] for row in found}

    def _check_successor(self, step: Row, replica: Row, replicas: Mapping[int, Row]) -> None:
        before = replicas[replica["succeeds"]]
        twins = [row["name"] for row in replicas.values() if row["succeeds"] == before["id"] and _exists(row)]
        if before["phase"] != "RUNNING" or twins != [replica["name"]]:
            raise Broken(f"2: {twins} succeed {before['name']}, which is {before['phase']}")
        if before["succeeds"] in replicas and _exists(replicas[before["succeeds"]]):
            raise Broken(f"2: {replica['name']} succeeds {before['name']}, which is a successor in waiting itself")
        [seen] = self.rows(
            "SELECT j.ends_at, EXISTS (SELECT FROM endpoints e JOIN endpoint_history h ON h.endpoint_id = e.id "
            "WHERE e.replica_id = j.replica_id AND h.health = 'READY') AS has_served "
            "FROM slurm_jobs j WHERE (j.replica_id, j.job_id) = (%s, %s)",
            [before["id"], before["slurm_job_id"]],
        )
        if not seen["has_served"]:
            raise Broken(f"2: {replica['name']} succeeds {before['name']}, which has never served")
        if seen["ends_at"] is None:
            return  # shown in an odd state meanwhile; the round went by the end that was known before
        half = (seen["ends_at"] - before["running_since"]) / 2
        if step["at"] < before["running_since"] + half:
            raise Broken(f"2: {replica['name']} succeeds {before['name']}, which is not half through its walltime")

    def _check_decision(self, decision: Row) -> None:
        self.told(
            f"{decision['actor']}: {decision['replica_set']} {decision['previous']} -> {decision['desired']}, "
            f"{decision['reason']}: {decision['explanation']}"
        )
        if decision["actor"] != "reconciler" or decision["desired"] == decision["previous"]:
            return
        if self.rows("SELECT FROM freezes WHERE coalesce(replica_set, %s) = %s", [decision["replica_set"]] * 2):
            raise Broken(f"4: {decision['replica_set']} is frozen, and was scaled: {decision['reason']}")
        [one] = self.rows("SELECT pinned_replicas AS pin FROM replica_sets WHERE name = %s", [decision["replica_set"]])
        if one["pin"] not in (None, decision["desired"]):
            raise Broken(f"4: {decision['replica_set']} is pinned at {one['pin']}, and went to {decision['desired']}")
        if decision["reason"] not in ("SCALED_UP", "SCALED_DOWN"):
            if decision["desired"] < decision["previous"] and one["pin"] is None:
                raise Broken(f"4: {decision['replica_set']} shrank: {decision['reason']}")
            return
        grows = decision["desired"] > decision["previous"]
        keys = [key for key in decision["alerts"] if not key.startswith("proxy/")]
        rules = [self._grafana.rule(key) for key in keys]
        if not decision["alerts"]:
            raise Broken(f"4: {decision['replica_set']} was scaled by no alert")
        if len(keys) < len(decision["alerts"]):
            self._check_pressed_by_proxies(decision, is_alone=not keys)
        for rule in rules:
            assert rule is not None
            if rule.action != ("scale_up" if grows else "scale_down") or rule.state_reason is not None:
                raise Broken(f"4: {decision['replica_set']} {decision['reason']} because of {rule.labels}")
            fired_until = max(filter(None, (rule.ends_at, rule.said_until)), default=None)
            is_long_ago = fired_until is not None and self._clock() - fired_until > STALE_AFTER + timedelta(minutes=2)
            if rule.starts_at is None or (not rule.is_firing and is_long_ago):
                raise Broken(f"4: {decision['replica_set']} {decision['reason']} because of what fires no more")

    def _check_pressed_by_proxies(self, decision: Row, *, is_alone: bool) -> None:
        name, told_at = decision["replica_set"], self.held_told_at()
        if told_at is None or self._clock() - told_at > GOOD_FOR + timedelta(minutes=2):
            raise Broken(f"4: {name} {decision['reason']} because of requests that nobody holds")
        if is_alone and decision["desired"] != decision["previous"] + 1:
            raise Broken(f"4: held requests took {name} from {decision['previous']} to {decision['desired']}")

    # --- when it is quiet ----------------------------------------------------------------------------------

    def unsettled(self) -> str | None:
        """Why the world is not settled, in words; None: every job has its intent, every intent its job and endpoint.

        Walltimes end all the time: successors on their way, and predecessors on theirs, are what is left out.
        """
        living = self.rows(
            "SELECT r.*, e.health FROM replicas r LEFT JOIN endpoints e ON e.replica_id = r.id WHERE r.phase <> 'ENDED'"
        )
        existing = {row["id"] for row in living if _exists(row)}
        in_turn = {row["name"] for row in living if row["succeeds"] in existing or row["reason"] == "HANDED_OVER"}
        live = [row for row in living if row["name"] not in in_turn]
        jobs = [job for job in self._slurm.ours_alive() if job.name not in in_turn]
        names = Counter(job.name for job in jobs)
        sets = self.rows("SELECT * FROM replica_sets")
        for one in sets:
            wanted = self._where_alerts_lead(one) if len(sets) == 1 else None
            if wanted not in (None, one["desired_replicas"]):
                return f"{one['name']} desires {one['desired_replicas']}, and what fires asks for {wanted}"
            own = [row for row in live if row["replica_set"] == one["name"]]
            target = 0 if one["is_paused"] else one["desired_replicas"]
            has_room = target < one["max_replicas"] + one["spec"]["surge"]
            first_leave = 0 if has_room else sum(row["reason"] == "HANDED_OVER" and not _exists(row) for row in living)
            if len(own) != target and len(own) + first_leave != target:
                return f"{one['name']} wants {target} and has {[(row['name'], row['phase']) for row in own]}"
            for row in own:
                if (row["phase"], row["health"], row["spec_hash"]) != ("RUNNING", "READY", one["spec_hash"]):
                    return f"{row['name']} is {row['phase']}, its endpoint {row['health']}"
        self.note_marks()
        vacant = {job.name for job in jobs if job.node in self._drained_since}
        if vacant & {row["name"] for row in live}:
            return f"{', '.join(sorted(vacant))} stay on a node that is drained"
        if names != Counter(row["name"] for row in live):
            return f"jobs {sorted(names.elements())} and intents {sorted(row['name'] for row in live)}"
        known = {(row["slurm_job_id"], row["name"]) for row in live}
        if known != {(job.job_id, job.name) for job in jobs} or any(job.state != "RUNNING" for job in jobs):
            return f"intents {sorted(known)} and jobs {[(job.job_id, job.name, job.state) for job in jobs]}"
        return None if self._slurm.is_quiet or in_turn else "Slurm has something under way"

    def _where_alerts_lead(self, replica_set: Row) -> int | None:
        """Invariant 3: what fires in the end decides where the only set comes to, however it was told of it."""
        firing = {rule.action for rule in self._grafana.rules if rule.is_firing and rule.state_reason is None}
        is_held = replica_set["pinned_replicas"] is not None or self.rows("SELECT FROM freezes")
        if replica_set["is_paused"] or is_held:
            return None
        if "scale_up" in firing:
            return int(replica_set["max_replicas"])
        return int(replica_set["min_replicas"]) if "scale_down" in firing else None


def has_certainly_failed(fate: Fate, status: int, content: bytes) -> bool:
    """Did a submit certainly make no job, as far as its sender can know?"""
    if fate in (Fate.REFUSED, Fate.NOT_CONNECTED):
        return True
    said = any(number in content for number in (b"1800", b"1007"))
    return fate in (Fate.DONE, Fate.SLOW, Fate.DIES_AFTER) and status != 200 and (said or status in (401, 404, 511))


def _exists(row: Row) -> bool:
    return row["phase"] in _EXISTING


def _adds_one(step: Row) -> bool:
    """Does one more exist by this step of the reconciler's?"""
    here = (step["from_phase"], step["to_phase"])
    return here == (None, "PENDING") or (here == ("DRAINING", "RUNNING") and step["actor"] != OPERATOR)


def _words(name: str, step: Row) -> str:
    job = f" job {step['slurm_job_id']}" if step["slurm_job_id"] else ""
    why = ", ".join(filter(None, (step["reason"], step["message"])))
    return f"{step['actor']}: {name} {step['from_phase']} -> {step['to_phase']}{job}{f' ({why})' if why else ''}"
