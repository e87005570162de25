"""What a decision and a replica were made because of, kept with them when they are made: later it cannot be told.

Of a decision: the alerts that pressed, as they were. Of a replica: the decision that wanted it, and the replica in
whose place it was made, if it was made in one's place.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from controlplane.core.stories import AlertThen

ALERT = """jsonb_build_object(
    'key', a.source || '/' || a.org_id || '/' || a.fingerprint,
    'alertname', a.alertname,
    'action', a.action,
    'starts_at', a.starts_at,
    'summary', left(a.annotations->>'summary', 512),
    'labels', a.labels,
    'values', CASE WHEN a.values <> '{}' THEN a.values -- a pull brings none
                   WHEN d.starts_at = a.starts_at THEN d.payload->'values' END,
    'rule_uid', coalesce(d.payload->>'ruleUID',
                         substring(d.payload->>'generatorURL' from '/alerting/grafana/([^/?]+)')),
    'generator_url', left(d.payload->>'generatorURL', 1024),
    'ignored_reason', a.ignored_reason)"""
"""The document of an alert `a`, whose rule the delivery `d` told of, if any did; `alert_then` reads it."""

DELIVERY = """LEFT JOIN LATERAL (
           SELECT payload, starts_at FROM alert_deliveries
            WHERE (source, org_id, fingerprint, status) = (a.source, a.org_id, a.fingerprint, 'firing')
              AND starts_at <= a.starts_at
            ORDER BY starts_at DESC LIMIT 1) d ON true"""

EVIDENCE = f"""
    SELECT coalesce(jsonb_agg({ALERT} ORDER BY a.alertname, a.fingerprint), '[]')
      FROM alerts a {DELIVERY}
     WHERE a.source || '/' || a.org_id || '/' || a.fingerprint = ANY (%s)"""
"""The evidence of a decision; its one parameter is the list of the keys of its alerts."""

CAUSE = """
    predecessor AS ( -- of a hand-over: it is still there
        SELECT name, decision_id FROM replicas WHERE id = %(succeeds)s
    ), vacating AS ( -- the oldest that is to leave its node, and whose place nobody took: it too is still there
        SELECT r.name, r.decision_id FROM replicas r
         WHERE r.replica_set = %(set)s AND r.name = ANY (%(beside)s) AND r.phase = ANY (%(existing)s)
           AND NOT EXISTS (SELECT FROM replicas taker WHERE taker.replaces = r.name)
         ORDER BY r.id LIMIT 1
    ), lowered AS (
        SELECT id, at FROM decisions WHERE replica_set = %(set)s AND desired < previous ORDER BY id DESC LIMIT 1
    ), raised AS ( -- the count, and not all replicas were made that it was raised for
        SELECT d.id FROM decisions d
         WHERE d.replica_set = %(set)s AND d.desired > d.previous AND d.id > coalesce((SELECT id FROM lowered), 0)
           AND (SELECT count(*) FROM replicas r WHERE r.decision_id = d.id AND r.replaces IS NULL)
               < d.desired - d.previous
         ORDER BY d.id LIMIT 1
    ), said AS ( -- an operator asks with a spec, or by resuming a set, for what was desired already
        SELECT id FROM decisions
         WHERE replica_set = %(set)s AND (desired <> previous OR actor <> 'reconciler')
         ORDER BY id DESC LIMIT 1
    ), gone AS ( -- the newest that left to be replaced, whose place was neither given up nor taken
        SELECT r.name, r.decision_id
          FROM replicas r
         CROSS JOIN LATERAL (SELECT max(h.at) AS at FROM replica_history h
                              WHERE h.replica_id = r.id AND h.from_phase = ANY (%(existing)s)
                                AND h.to_phase <> ALL (%(existing)s)) left_existence
         WHERE r.replica_set = %(set)s AND r.phase <> ALL (%(existing)s)
           AND r.reason NOT IN ('SCALED_DOWN', 'ROLLED')
           AND (r.ended_at IS NULL OR r.ended_at > %(now)s::timestamptz - interval '1 day')
           AND left_existence.at > coalesce((SELECT at FROM lowered), '-infinity')
           AND NOT EXISTS (SELECT FROM replicas taker WHERE taker.replaces = r.name)
         ORDER BY left_existence.at DESC, r.id DESC LIMIT 1
    ), cause AS (
        SELECT coalesce((SELECT decision_id FROM predecessor), (SELECT decision_id FROM vacating),
                        (SELECT decision_id FROM gone), (SELECT id FROM raised), (SELECT id FROM said)) AS decision_id,
               coalesce((SELECT name FROM predecessor), (SELECT name FROM vacating),
                        (SELECT name FROM gone)) AS replaces
    )"""
"""Why the next replica of a set is made: `cause`, of one row. Parameters: set, succeeds, beside, existing, now."""


def alert_then(document: dict[str, Any]) -> AlertThen:
    """An alert from the document that `ALERT` made."""
    values = document["values"] or {}
    return AlertThen(
        **{
            **document,
            "starts_at": datetime.fromisoformat(document["starts_at"]),
            "summary": document["summary"] or "",
            "values": {name: value for name, value in values.items() if isinstance(value, int | float)},
        }
    )
