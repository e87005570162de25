"""The operators' API under `/api/v1`: what there is, and the verbs that change it.

Every request needs an operator's token, whose name goes into the audit. A verb may be repeated: what already is as
asked answers 200 with `changed: false`. With `dry_run=true` nothing is written, and the answer is what would be. A
parameter or a key that is not known is refused, because `dry-run=true` must not scale anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from controlplane.core.times import parse_month, parse_time
from controlplane.core.types import Freeze, Phase, ReplicaSet, ReplicaSetSpec
from controlplane.core.verbs import Verb
from controlplane.db import (
    Database,
    NotFound,
    alerts,
    audit,
    back_offs,
    decisions,
    endpoints,
    freezes,
    job_logs,
    nodes,
    replica_sets,
    replicas,
    tenants,
    usage,
)
from controlplane.slurm.script import ScriptError, ScriptOptions, check
from controlplane.specs import SpecError, faults_of, parse_one
from controlplane.specs.file_format import CountOrNone, Text
from controlplane.web import documents
from controlplane.web.bodies import read_body
from controlplane.web.credentials import OperatorToken, actor_of
from controlplane.web.errors import Refused
from controlplane.web.why import Whys

_SHOWN = 100
_MOST_SHOWN = 1000
_ALERTS_SHOWN_FOR = timedelta(days=1)

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Order:
    """What an operator asked, and when. `name`: of the replica set or replica in the path, as it was written there."""

    actor: str
    now: datetime
    name: str
    parameters: Mapping[str, str]
    body: bytes
    is_dry_run: bool


Answer = Callable[[Order], Awaitable[documents.Document]]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _utc(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_time(value)
    except ValueError as error:
        raise PydanticCustomError("time", "{why}", {"why": str(error)}) from None


Time = Annotated[datetime, BeforeValidator(_utc)]


class ScaleBody(_Body):
    replicas: CountOrNone | None = None
    min_replicas: CountOrNone | None = None
    max_replicas: CountOrNone | None = None
    until: Time | None = None
    reason: Text | None = None


class LastingBody(_Body):
    """For what lasts until it is undone, or until then."""

    reason: Text | None = None
    until: Time | None = None


class ReasonBody(_Body):
    reason: Text | None = None


class LimitsBody(_Body):
    """What is null is no limit, and what is not given stays."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    monthly_tokens: int | None = None
    weight: float = 1.0


class EmptyBody(_Body):
    pass


def routes(
    db: Database,
    operators: tuple[OperatorToken, ...],
    script: ScriptOptions | None,
    clock: Callable[[], datetime],
    *,
    max_body_bytes: int,
) -> list[Route]:
    def route(method: str, path: str, answer: Answer, *, parameters: Collection[str] = ()) -> Route:
        async def respond(request: Request) -> Response:
            actor = actor_of(operators, request.headers)
            _check_parameters(request.query_params, parameters)
            order = Order(
                actor=actor,
                now=clock(),
                name=request.path_params.get("name", ""),
                parameters=request.query_params,
                body=await read_body(request, max_body_bytes),
                is_dry_run=_is_dry_run(request.query_params),
            )
            return JSONResponse(await answer(order))

        return Route(f"/api/v1/{path}", respond, methods=[method])

    def verb(path: str, answer: Answer, *, method: str = "POST") -> Route:
        return route(method, path, answer, parameters=("dry_run",))

    def story(path: str, tell: Callable[[str, Mapping[str, str], datetime], Awaitable[documents.Document]]) -> Route:
        return route("GET", path, lambda order: tell(order.name, order.parameters, order.now), parameters=("at",))

    reads, sets, whys = _Reads(db), _ReplicaSetVerbs(db, script), Whys(db)
    return [
        route("GET", "replica-sets", reads.replica_sets),
        route("GET", "replicas", reads.replicas, parameters=("limit",)),
        route("GET", "endpoints", reads.endpoints),
        route("GET", "alerts", reads.alerts, parameters=("since",)),
        route("GET", "decisions", reads.decisions, parameters=("replica_set", "limit")),
        route("GET", "audit", reads.audit, parameters=("limit",)),
        story("replica-sets/{name}/why", whys.of_set),
        story("replicas/{name}/why", whys.of_replica),
        story("slurm-jobs/{name}/why", whys.of_job),
        verb("replica-sets/{name}", sets.apply, method="PUT"),
        verb("replica-sets/{name}/scale", sets.scale),
        verb("replica-sets/{name}/pause", sets.pause),
        verb("replica-sets/{name}/resume", sets.resume),
        verb("replica-sets/{name}/freeze", sets.freeze),
        verb("replica-sets/{name}/unfreeze", sets.unfreeze),
        verb("freeze", sets.freeze_all),
        verb("unfreeze", sets.unfreeze_all),
        *(verb(f"replicas/{{name}}/{word}", _replica_verb(db, word)) for word in Verb),
        route("GET", "tenants", reads.tenants),
        route("GET", "usage", reads.usage, parameters=("by", "month", "tenant")),
        verb("tenants/{name}/limits", _set_limits(db), method="PUT"),
        route("GET", "nodes", reads.nodes),
        verb("nodes/{name}/drain", _drain_node(db)),
        verb("nodes/{name}/undrain", _undrain_node(db)),
    ]


class _Reads:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def replica_sets(self, _order: Order) -> documents.Document:
        pauses = await back_offs.load(self._db)
        return {
            "replica_sets": [
                {
                    **documents.replica_set_document(one),
                    "back_off": documents.back_off_document(pauses.get(one.name)),
                }
                for one in await replica_sets.load_all(self._db)
            ]
        }

    async def replicas(self, order: Order) -> documents.Document:
        """Every live one, and the newest of those that ended."""
        newest = await replicas.load_newest(self._db, limit=_limit(order.parameters))
        shown = [*await replicas.load_live(self._db), *(one for one in newest if one.phase is Phase.ENDED)]
        logs = await job_logs.load(self._db, [one.name for one in shown])
        return {
            "replicas": [
                {**documents.replica_document(one), "log": documents.log_document(logs.get(one.name))}
                for one in sorted(shown, key=lambda one: -one.id)
            ]
        }

    async def nodes(self, _order: Order) -> documents.Document:
        return {"nodes": [documents.node_document(one) for one in await nodes.load(self._db)]}

    async def endpoints(self, _order: Order) -> documents.Document:
        routable = {one.endpoint_id for one in await endpoints.load_routable(self._db)}
        live = await endpoints.load_live(self._db)
        return {"endpoints": [documents.endpoint_document(one, is_routable=one.id in routable) for one in live]}

    async def alerts(self, order: Order) -> documents.Document:
        """Those confirmed or ended since then, or within a day."""
        since = order.now - _ALERTS_SHOWN_FOR
        if (text := order.parameters.get("since")) is not None:
            try:
                since = parse_time(text)
            except ValueError as error:
                raise Refused(400, f"since: {error}", field="since") from None
        return {"alerts": [documents.alert_document(one) for one in await alerts.load_since(self._db, since)]}

    async def decisions(self, order: Order) -> documents.Document:
        name = order.parameters.get("replica_set")
        if name is not None:
            name = _checked_name(name)
        newest = await decisions.load_newest(self._db, replica_set=name, limit=_limit(order.parameters))
        return {"decisions": [documents.decision_document(one) for one in newest]}

    async def audit(self, order: Order) -> documents.Document:
        newest = await audit.load_newest(self._db, limit=_limit(order.parameters))
        return {"audit": [documents.said_document(one) for one in newest]}

    async def tenants(self, order: Order) -> documents.Document:
        return {"tenants": [documents.tenant_document(one) for one in await tenants.load_all(self._db, order.now)]}

    async def usage(self, order: Order) -> documents.Document:
        """Of one month, by default the current one; of one tenant, if one is named."""
        try:
            first, end = parse_month(order.parameters.get("month", f"{order.now:%Y-%m}"))
        except ValueError as error:
            raise Refused(400, f"month: {error}", field="month") from None
        try:
            by = usage.By(order.parameters.get("by", usage.By.TENANT))
        except ValueError:
            raise Refused(400, f"by: must be one of {', '.join(usage.By)}", field="by") from None
        tenant = order.parameters.get("tenant")
        if tenant is not None and not re.fullmatch(tenants.NAME, tenant):
            raise Refused(400, "tenant: is no tenant's name", field="tenant")
        report = await usage.report(self._db, by, first, end, order.now, tenant=tenant)
        return documents.usage_document(report, by=by, first=first, tenant=tenant)


class _ReplicaSetVerbs:
    def __init__(self, db: Database, script: ScriptOptions | None) -> None:
        self._db = db
        self._script = script

    async def apply(self, order: Order) -> documents.Document:
        spec = _spec_of(order)
        _check_script(spec, self._script)
        try:
            applied = await replica_sets.apply(
                self._db, spec, actor=order.actor, now=order.now, dry_run=order.is_dry_run
            )
        except ValueError as error:
            raise _field_at_fault(error) from None
        return {
            "changed": applied is not replica_sets.Applied.UNCHANGED,
            "outcome": applied,
            "dry_run": order.is_dry_run,
            "spec": documents.spec_document(spec),
        }

    async def scale(self, order: Order) -> documents.Document:
        body = _read(order, ScaleBody)
        if body.replicas is None and body.min_replicas is None and body.max_replicas is None:
            raise Refused(400, "replicas: give replicas, min_replicas or max_replicas", field="replicas")
        return await self._changed(order, replica_sets.scale, **body.model_dump())

    async def pause(self, order: Order) -> documents.Document:
        body = _read(order, LastingBody)
        return await self._changed(order, replica_sets.pause, **body.model_dump())

    async def resume(self, order: Order) -> documents.Document:
        _read(order, EmptyBody)
        return await self._changed(order, replica_sets.resume)

    async def freeze(self, order: Order) -> documents.Document:
        body = _read(order, LastingBody)
        return await self._changed(order, freezes.freeze, **body.model_dump())

    async def unfreeze(self, order: Order) -> documents.Document:
        _read(order, EmptyBody)
        return await self._changed(order, freezes.unfreeze)

    async def freeze_all(self, order: Order) -> documents.Document:
        body = _read(order, LastingBody)
        return await self._changed_for_all(order, freezes.freeze_all, **body.model_dump())

    async def unfreeze_all(self, order: Order) -> documents.Document:
        _read(order, EmptyBody)
        return await self._changed_for_all(order, freezes.unfreeze_all)

    async def _changed_for_all(
        self, order: Order, verb: Callable[..., Awaitable[Freeze | None]], **wanted: object
    ) -> documents.Document:
        before = await freezes.load_of_all(self._db)
        try:
            after = await verb(self._db, actor=order.actor, now=order.now, dry_run=order.is_dry_run, **wanted)
        except ValueError as error:
            raise _field_at_fault(error) from None
        return {
            "changed": after != before,
            "dry_run": order.is_dry_run,
            "freeze": after and documents.freeze_document(after),
        }

    async def _changed(
        self, order: Order, verb: Callable[..., Awaitable[ReplicaSet]], **wanted: object
    ) -> documents.Document:
        name = _checked_name(order.name)
        before = await replica_sets.load(self._db, name)
        try:
            after = await verb(self._db, name, actor=order.actor, now=order.now, dry_run=order.is_dry_run, **wanted)
        except ValueError as error:
            raise _field_at_fault(error) from None
        return {
            "changed": after != before,
            "dry_run": order.is_dry_run,
            "replica_set": documents.replica_set_document(after),
        }


def _replica_verb(db: Database, word: Verb) -> Answer:
    async def answer(order: Order) -> documents.Document:
        name, reason = _checked_name(order.name), _read(order, ReasonBody).reason
        obeyed = await replicas.obey(
            db, name, word, actor=order.actor, now=order.now, reason=reason, dry_run=order.is_dry_run
        )
        return {
            "changed": obeyed.is_changed,
            "dry_run": order.is_dry_run,
            "replica": documents.replica_document(obeyed.replica),
        }

    return answer


def _set_limits(db: Database) -> Answer:
    async def answer(order: Order) -> documents.Document:
        changes = _read(order, LimitsBody).model_dump(exclude_unset=True)
        if not changes:
            raise Refused(400, f"give at least one of {', '.join(LimitsBody.model_fields)}")
        try:
            limits, is_changed = await tenants.set_limits(
                db, order.name, changes, actor=order.actor, now=order.now, dry_run=order.is_dry_run
            )
        except ValueError as error:
            raise _field_at_fault(error) from None
        return {
            "changed": is_changed,
            "dry_run": order.is_dry_run,
            "tenant": order.name,
            "limits": documents.limits_document(limits),
        }

    return answer


def _drain_node(db: Database) -> Answer:
    async def answer(order: Order) -> documents.Document:
        body = _read(order, LastingBody)
        marked = await _checked(
            nodes.drain(
                db,
                order.name,
                actor=order.actor,
                now=order.now,
                reason=body.reason,
                until=body.until,
                dry_run=order.is_dry_run,
            )
        )
        return _node_answer(order, marked)

    return answer


def _undrain_node(db: Database) -> Answer:
    async def answer(order: Order) -> documents.Document:
        _read(order, EmptyBody)
        marked = await _checked(
            nodes.undrain(db, order.name, actor=order.actor, now=order.now, dry_run=order.is_dry_run)
        )
        return _node_answer(order, marked)

    return answer


async def _checked(marking: Awaitable[nodes.Marked]) -> nodes.Marked:
    try:
        return await marking
    except ValueError as error:
        raise _field_at_fault(error) from None


def _node_answer(order: Order, marked: nodes.Marked) -> documents.Document:
    return {
        "changed": marked.is_changed,
        "dry_run": order.is_dry_run,
        "node": marked.node,
        "marks": [documents.node_document(one) for one in marked.marks],
    }


# --- what a request says ------------------------------------------------------------------------------------


def _spec_of(order: Order) -> ReplicaSetSpec:
    try:
        document = json.loads(order.body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(document, dict):
        raise Refused(400, "the body must be a JSON object")
    spec = parse_one({"name": order.name, **document})
    if spec.name != order.name:
        raise Refused(400, "name: is not the one in the path", field="name")
    return spec


def _check_script(spec: ReplicaSetSpec, script: ScriptOptions | None) -> None:
    """A spec that no job script can be made of would fail at every submit: refuse it here."""
    try:
        check(spec, script)
    except ScriptError as error:
        raise Refused(400, str(error), field=error.field) from None


def _read(order: Order, shape: type[Body]) -> Body:
    try:
        return shape.model_validate_json(order.body or b"{}")
    except ValidationError as error:
        raise SpecError(*faults_of(error)) from None


def _check_parameters(parameters: Mapping[str, str], known: Collection[str]) -> None:
    for name in parameters:
        if name not in known:
            words = f"known here: {', '.join(known)}" if known else "none is known here"
            raise Refused(400, f"{name[:64]}: is no parameter; {words}", field=name[:64])


def _is_dry_run(parameters: Mapping[str, str]) -> bool:
    text = parameters.get("dry_run", "false")
    if text not in ("true", "false"):
        raise Refused(400, "dry_run: must be true or false", field="dry_run")
    return text == "true"


def _limit(parameters: Mapping[str, str]) -> int:
    text = parameters.get("limit", str(_SHOWN))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text) or int(text) > _MOST_SHOWN:
        raise Refused(400, f"limit: must be 1 to {_MOST_SHOWN}", field="limit")
    return int(text)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]{1,64}", name):
        raise NotFound("there is nothing of that name: names are lower-case letters, digits and dashes")
    return name


def _field_at_fault(error: ValueError) -> Refused:
    """The database room says `field: what is wrong`."""
    field, _, _ = str(error).partition(":")
    return Refused(400, str(error), field=field)
