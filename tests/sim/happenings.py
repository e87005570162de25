"""What may happen at any moment, and when it hurts: to Slurm, to jobs and engines, and to Grafana's alerts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from tests.sim.grafana import Rule
from tests.sim.slurm import ANOTHER_INSTALLATION, NODES, US, Job, Reservation
from tests.sim.steps import Parked

if TYPE_CHECKING:
    from tests.sim.world import World


class Happenings:
    def __init__(self, world: World) -> None:
        self._world = world

    def hurt(self, parked: Parked) -> None:
        """slurmctld loses a job, and gives its id to somebody else, just when we look at it to act upon it."""
        if self._world.weather.hurt == 0 or " GET job/" not in parked.label:
            return
        job_id = int(parked.label.rsplit("/", 1)[1])
        if job_id in self._world.slurm.unsaved() and self._world.rng.random() < self._world.weather.hurt:
            self._crash()
            while self._world.slurm.next_id <= job_id:
                self._somebody_submits()

    def _crash(self) -> None:
        """Not between the look at a job and the act upon it: no client can close that gap."""
        acting = {int(one.label.rsplit("/", 1)[1]) for one in self._world.stage.parked if _acts_upon_a_job(one)}
        if not acting & self._world.slurm.unsaved() and not self._world.slurm.is_down:
            self._world.slurm.crash()

    def something(self) -> None:
        rng = self._world.rng
        kinds: dict[Callable[[], None], float] = {
            self._alert_changes: 4,
            self._job_ends: 3,
            self._slurm_troubles: 2,
            self._crash: 1,
            self._somebody_submits: 0.5,
            self._another_installation_submits: 0.5,
            self._state_is_odd: 0.5,
            self._engine_freezes: 1,
            self._token_is_renewed: 2,
            self._nodes_vanish: 0.5,
            self._engines_crash: 0.5,
            self._maintenance_is_planned: 0.5,
        }
        [kind] = rng.choices(list(kinds), list(kinds.values()))
        kind()

    def _alert_changes(self) -> None:
        rule = self._world.rng.choice(self._world.grafana.rules)
        replicas = [row["name"] for row in self._world.watch.rows("SELECT name FROM replicas WHERE phase = 'RUNNING'")]
        if replicas and self._world.rng.random() < 0.15:
            name = self._world.rng.choice(sorted(replicas))
            labels = {"alertname": name, "owner": "controlplane", "action": "replace", "replica": name}
            rule = next((one for one in self._world.grafana.rules if one.fingerprint == name), Rule(name, labels))
            self._world.grafana.rules = [*(one for one in self._world.grafana.rules if one is not rule), rule]
        if rule.is_firing and self._world.rng.random() < 0.2:
            self._world.grafana.notify([one for one in self._world.grafana.rules if one.is_firing])
            return
        self._world.grafana.change(rule, is_firing=not rule.is_firing, now=self._world.now)
        self._world.say(f"grafana: {rule.fingerprint} {'fires' if rule.is_firing else 'has resolved'}")

    def _ours(self, *states: str) -> list[Job]:
        return [job for job in self._world.slurm.jobs.values() if job.is_ours and job.state in states and job.may_run]

    def _job_ends(self) -> None:
        """As nobody asked it to."""
        rng, slurm = self._world.rng, self._world.slurm
        running = self._ours("RUNNING")
        if not running:
            return
        job = rng.choice(running)
        match rng.randrange(5):
            case 0:
                slurm.fail_node(job, lives_for=timedelta(seconds=rng.choice((20, 90))))
            case 1:
                slurm.requeue(job) if job.may_requeue else slurm.end(job, "PREEMPTED", "None", signal=9)
            case 2:
                slurm.end(job, "FAILED", "NonZeroExitCode", exit_code=3)
            case 3:
                slurm.end(job, "CANCELLED", "None", signal=15)
            case _:
                job.ends_at = self._world.now  # walltime

    def _slurm_troubles(self) -> None:
        name = self._world.rng.choice(("is_down", "is_frozen", "refuses_tokens", "is_gone"))
        setattr(self._world.slurm, name, True)
        self._world.say(f"slurm: {name}")

    def _state_is_odd(self) -> None:
        if ours := self._ours("RUNNING", "PENDING"):
            job = self._world.rng.choice(ours)
            job.odd_state = None if job.odd_state else "LEVITATING"

    def _another_installation_submits(self) -> None:
        """A job by the name of a replica that we have, or shall have; not by an id as well that had been ours."""
        if self._world.slurm.next_id <= self._world.slurm.highest_id:
            return
        [row] = self._world.watch.rows("SELECT coalesce(max(id), 0) AS newest FROM replicas")
        name = f"cp-a-{row['newest'] + self._world.rng.randint(0, 1)}"
        self._world.slurm.add(name, US, f"{name} {ANOTHER_INSTALLATION}", is_held=self._world.rng.random() < 0.5)

    def _somebody_submits(self) -> None:
        self._world.slurm.add("somebody-elses", "alice", is_held=self._world.rng.random() < 0.5)

    def _engine_freezes(self) -> None:
        if self._world.slurm.engines:
            engine = self._world.rng.choice(self._world.slurm.engines)
            engine.is_frozen = not engine.is_frozen
            self._world.say(f"engine of {engine.name} {'freezes' if engine.is_frozen else 'thaws'}")

    def _token_is_renewed(self) -> None:
        if self._world.token.good_until is not None:
            self._world.token.good_until = self._world.now + timedelta(seconds=90)

    def _nodes_vanish(self) -> None:
        self._world.site.blind_to_nodes = not self._world.site.blind_to_nodes and self._world.rng.random() < 0.5

    def _maintenance_is_planned(self) -> None:
        """Of all nodes, or of some; or it is called off."""
        rng, slurm = self._world.rng, self._world.slurm
        if slurm.reservations and rng.random() < 0.5:
            slurm.reservations.clear()
            self._world.say("slurm: no maintenance after all")
            return
        begins = self._world.now + timedelta(seconds=rng.choice((60, 240, 600, 1800)))
        nodes = frozenset(NODES) if rng.random() < 0.7 else frozenset(rng.sample(sorted(NODES), 2))
        slurm.reservations.append(
            Reservation(f"m{len(slurm.reservations)}", begins, begins + timedelta(seconds=rng.choice((60, 300))), nodes)
        )
        self._world.say(f"slurm: maintenance of {', '.join(sorted(nodes))} from {begins:%H:%M:%S}")

    def _engines_crash(self) -> None:
        """At their start, all of them; until that is put right."""
        self._world.slurm.engines_crash = not self._world.slurm.engines_crash and self._world.rng.random() < 0.5


def _acts_upon_a_job(parked: Parked) -> bool:
    return " DELETE job/" in parked.label or " POST job/1" in parked.label
