-- What dashboards may read: views in a schema of their own. `migrate --grant-dashboards-to` lets a role read them.
--
-- A view reads its tables as its owner does, who is theirs: so a role needs nothing but USAGE on the schema and SELECT
-- in it, and sees no column that is not named here. Not here are keys, their hashes and prefixes, secrets, specs with
-- their environment, scripts, logs of jobs, and payloads as they came. Foreign words are here only where the control
-- plane has cut them. Names of columns are a contract with dashboards, those of sites included: add, do not rename.
--
-- Views are made to be asked for a time, a set or a replica: such a condition reaches the tables' indexes.

DO $$ BEGIN -- where this user may not make a schema, somebody who may has made it before
    IF to_regnamespace('grafana') IS NULL THEN
        CREATE SCHEMA grafana;
    END IF;
END $$;

CREATE FUNCTION grafana.first_node(nodes text) RETURNS text LANGUAGE sql IMMUTABLE AS $$ -- of Slurm's `r[1-2]c[07-16],s1`
    SELECT regexp_replace((regexp_match(nodes, '^(?:[^],[]|\[[0-9,-]+\])+'))[1], '\[(\d+)[^]]*\]', '\1', 'g')
$$;

CREATE INDEX decisions_by_time ON decisions (at);
CREATE INDEX decisions_by_alert ON decisions USING gin (alerts) WITH (fastupdate = off); -- few are written, many asked for
CREATE INDEX slurm_job_history_by_time ON slurm_job_history (at);

-- --- what is wanted, and why ---------------------------------------------------------------------------------

CREATE VIEW grafana.decisions AS
SELECT d.id,
       d.at AS decided_at,
       d.replica_set,
       s.model,
       d.reason,
       CASE WHEN d.desired > d.previous THEN 'up'
            WHEN d.desired < d.previous THEN 'down'
            WHEN d.alerts <> '{}' THEN 'refused' -- alerts pressed, and were not followed
            ELSE 'kept' END AS kind,
       d.previous,
       d.desired,
       d.replica_set || CASE WHEN d.desired <> d.previous THEN ' ' || d.previous || ' -> ' || d.desired
                             ELSE ' stays at ' || d.desired END
           || ', ' || d.reason || ': ' || d.explanation AS sentence,
       d.explanation,
       (SELECT string_agg(DISTINCT e->>'alertname', ', ') FROM jsonb_array_elements(d.evidence) e) AS alert_names,
       d.actor
  FROM decisions d JOIN replica_sets s ON s.name = d.replica_set;

CREATE VIEW grafana.replica_sets AS
SELECT s.name,
       s.model,
       s.priority,
       s.is_external AS external,
       s.desired_replicas AS desired,
       s.min_replicas AS min,
       s.max_replicas AS max,
       (SELECT count(*) FROM replicas r
         WHERE r.replica_set = s.name AND r.phase IN ('PENDING', 'SUBMITTING', 'QUEUED', 'RUNNING')) AS existing,
       (SELECT count(*) FROM replicas r WHERE r.replica_set = s.name AND r.phase <> 'ENDED') AS live,
       (SELECT count(*) FROM routable_endpoints e WHERE e.replica_set = s.name) AS routable,
       s.is_paused AS paused,
       s.paused_reason,
       s.paused_until,
       f.since IS NOT NULL AS frozen,
       f.reason AS frozen_reason,
       f.until AS frozen_until,
       s.pinned_replicas AS pinned,
       s.pinned_by,
       s.pinned_reason,
       s.pinned_until,
       s.open_schedules,
       coalesce(s.spec->>'mode', 'active') AS mode,
       s.spec->'slurm'->>'partition' AS partition,
       s.spec->'slurm'->>'account' AS account,
       coalesce((s.spec->'slurm'->>'nodes')::integer, 1)
           * coalesce((s.spec->'slurm'->>'gpus_per_node')::integer, 0) AS gpus_per_replica,
       (s.spec->'slurm'->>'time_limit_seconds')::integer AS time_limit_seconds,
       s.start_lead_seconds,
       s.load_seconds,
       s.scaled_up_at,
       s.scaled_down_at,
       coalesce(b.failures, 0) AS failures,
       b.next_try_at,
       d.at AS decided_at,
       d.reason,
       CASE WHEN d.alerts <> '{}' AND d.desired = d.previous THEN 'refused because ' ELSE '' END
           || d.reason || ': ' || d.explanation AS sentence,
       s.created_at,
       s.updated_at
  FROM replica_sets s
  LEFT JOIN back_offs b ON b.replica_set = s.name
  LEFT JOIN LATERAL (
       SELECT * FROM freezes WHERE replica_set = s.name OR replica_set IS NULL ORDER BY replica_set LIMIT 1) f ON true
  LEFT JOIN LATERAL (
       SELECT * FROM decisions WHERE replica_set = s.name ORDER BY id DESC LIMIT 1) d ON true;

-- sets whose starts fail, or whose jobs were lost again and again
CREATE VIEW grafana.back_offs AS
SELECT b.replica_set, s.model, b.failures, b.since, b.next_try_at, b.replica, b.reason, b.message
  FROM back_offs b JOIN replica_sets s ON s.name = b.replica_set
 WHERE b.failures > 0;

-- --- replicas, their jobs and their endpoints ----------------------------------------------------------------

CREATE VIEW grafana.replicas AS
SELECT r.name,
       r.replica_set,
       coalesce(r.spec->>'model', s.model) AS model,
       r.phase,
       r.phase_since,
       r.reason,
       r.message,
       r.slurm_job_id,
       grafana.first_node(j.nodes) AS node, -- where the server answers
       nullif(j.nodes, '') AS nodes,
       coalesce((r.spec->'slurm'->>'nodes')::integer, 1)
           * coalesce((r.spec->'slurm'->>'gpus_per_node')::integer, 0) AS gpus,
       j.raw_state AS slurm_state,
       nullif(nullif(j.state_reason, ''), 'None') AS slurm_reason,
       e.health,
       EXISTS (SELECT FROM routable_endpoints o WHERE o.endpoint_id = e.id) AS routable,
       r.created_at,
       r.submitted_at,
       r.running_since,
       e.first_ready_at AS ready_at,
       CASE WHEN j.state IN ('RUNNING', 'SUSPENDED') AND r.phase <> 'ENDED' THEN j.ends_at END AS ends_at, -- walltime
       r.drain_deadline,
       r.ended_at,
       r.cut_requests,
       r.replaces,
       CASE r.phase
           WHEN 'PENDING' THEN 'nothing was asked of Slurm yet'
           WHEN 'SUBMITTING' THEN 'the answer to its submit is not known yet'
           WHEN 'QUEUED' THEN 'job ' || r.slurm_job_id || ' waits'
               || coalesce(', ' || nullif(nullif(j.state_reason, ''), 'None'), '')
           WHEN 'RUNNING' THEN 'job ' || r.slurm_job_id || ' runs' || coalesce(' on ' || nullif(j.nodes, ''), '')
               || CASE e.health WHEN 'READY' THEN ', ready'
                                WHEN 'FAILING' THEN ', fails' || coalesce(': ' || e.message, '')
                                ELSE ', not ready yet' END
           WHEN 'ENDED' THEN 'ended, ' || r.reason || coalesce(': ' || r.message, '')
           ELSE 'leaves, ' || r.reason || coalesce(': ' || r.message, '') END AS sentence,
       CASE WHEN r.replaces IS NOT NULL THEN 'in the place of ' || r.replaces
            ELSE d.reason || ': ' || d.explanation END AS made_because
  FROM replicas r
  JOIN replica_sets s ON s.name = r.replica_set
  LEFT JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
  LEFT JOIN endpoints e ON e.replica_id = r.id
  LEFT JOIN decisions d ON d.id = r.decision_id;

-- One row a step. ended_at: NULL while the replica is in it; of ENDED, which is no time, its begin.
CREATE VIEW grafana.replica_phases AS
SELECT r.name AS replica,
       r.replica_set,
       coalesce(r.spec->>'model', s.model) AS model,
       h.to_phase AS phase,
       h.at AS began_at,
       CASE h.to_phase WHEN 'ENDED' THEN h.at ELSE next.at END AS ended_at,
       h.reason,
       h.message,
       h.slurm_job_id,
       h.actor
  FROM replica_history h
  JOIN replicas r ON r.id = h.replica_id
  JOIN replica_sets s ON s.name = r.replica_set
  LEFT JOIN LATERAL (
       SELECT at FROM replica_history
        WHERE replica_id = h.replica_id AND version > h.version ORDER BY version LIMIT 1) next ON true;

CREATE VIEW grafana.slurm_jobs AS
SELECT r.name AS replica,
       r.replica_set,
       coalesce(r.spec->>'model', s.model) AS model,
       j.job_id AS slurm_job_id,
       j.state,
       j.raw_state,
       nullif(nullif(j.state_reason, ''), 'None') AS reason,
       grafana.first_node(j.nodes) AS node, -- where the server answers
       nullif(j.nodes, '') AS nodes,
       coalesce((r.spec->'slurm'->>'nodes')::integer, 1)
           * coalesce((r.spec->'slurm'->>'gpus_per_node')::integer, 0) AS gpus,
       j.submitted_at,
       CASE WHEN j.state <> 'PENDING' THEN j.started_at END AS started_at,
       CASE WHEN j.state = 'PENDING' THEN j.started_at END AS expected_start_at, -- Slurm's estimate
       CASE WHEN j.state NOT IN ('PENDING', 'RUNNING', 'SUSPENDED', 'COMPLETING', 'UNKNOWN')
            THEN coalesce(j.ends_at, r.ended_at) END AS ended_at,
       CASE WHEN j.state IN ('RUNNING', 'SUSPENDED') THEN j.ends_at END AS ends_at, -- the walltime's end
       j.exit_code,
       j.signal,
       j.restart_count,
       j.observed_at
  FROM slurm_jobs j
  JOIN replicas r ON r.id = j.replica_id
  JOIN replica_sets s ON s.name = r.replica_set;

-- What Slurm said, one row when it said something new. ended_at: NULL for the newest of a job.
CREATE VIEW grafana.slurm_job_states AS
SELECT r.name AS replica,
       r.replica_set,
       coalesce(r.spec->>'model', s.model) AS model,
       h.job_id AS slurm_job_id,
       h.state,
       h.raw_state,
       nullif(nullif(h.state_reason, ''), 'None') AS reason,
       h.is_held AS held,
       grafana.first_node(h.nodes) AS node,
       nullif(h.nodes, '') AS nodes,
       h.restart_count,
       h.at AS began_at,
       next.at AS ended_at
  FROM slurm_job_history h
  JOIN replicas r ON r.id = h.replica_id
  JOIN replica_sets s ON s.name = r.replica_set
  LEFT JOIN LATERAL (
       SELECT at FROM slurm_job_history
        WHERE replica_id = h.replica_id AND id > h.id AND job_id = h.job_id ORDER BY id LIMIT 1) next ON true;

-- A URL without what may stand before its host, or behind its port.
CREATE VIEW grafana.endpoints AS
SELECT e.id,
       r.name AS replica, -- NULL: Slurm does not run it
       e.replica_set,
       coalesce(r.spec->>'model', s.model) AS model,
       substring(e.url FROM '^https?://') || substring(e.url FROM '^https?://(?:[^/?#]*@)?([^/?#@]*)') AS url,
       e.health AS state,
       EXISTS (SELECT FROM routable_endpoints o WHERE o.endpoint_id = e.id) AS routable,
       r.phase,
       e.first_ready_at,
       e.failing_since,
       e.probed_at,
       e.confirmed_at,
       e.running,
       e.waiting,
       e.generated_tokens,
       e.message,
       e.created_at
  FROM endpoints e
  JOIN replica_sets s ON s.name = e.replica_set
  LEFT JOIN replicas r ON r.id = e.replica_id;

CREATE VIEW grafana.endpoint_states AS
SELECT e.id AS endpoint_id,
       r.name AS replica,
       e.replica_set,
       coalesce(r.spec->>'model', s.model) AS model,
       substring(h.url FROM '^https?://') || substring(h.url FROM '^https?://(?:[^/?#]*@)?([^/?#@]*)') AS url,
       h.health AS state,
       h.message,
       h.at AS began_at,
       coalesce(next.at, r.ended_at) AS ended_at
  FROM endpoint_history h
  JOIN endpoints e ON e.id = h.endpoint_id
  JOIN replica_sets s ON s.name = e.replica_set
  LEFT JOIN replicas r ON r.id = e.replica_id
  LEFT JOIN LATERAL (
       SELECT at FROM endpoint_history WHERE endpoint_id = h.endpoint_id AND id > h.id ORDER BY id LIMIT 1) next ON true;

-- --- what pressed, and who said what -------------------------------------------------------------------------

CREATE VIEW grafana.alerts AS
SELECT a.source,
       a.alertname AS name,
       a.action,
       a.labels->>'model' AS model,
       a.labels->>'replica_set' AS replica_set,
       a.labels->>'replica' AS replica,
       a.labels->>'node' AS node,
       a.labels->>'severity' AS severity,
       a.step,
       a.status,
       a.starts_at,
       a.ends_at,
       a.refreshed_at,
       a.stale_since,
       CASE WHEN a.ignored_reason IS NOT NULL THEN 'ignored: ' || a.ignored_reason
            WHEN a.action = 'drain_node' AND n.cleared_at IS NOT NULL THEN 'cleared by ' || n.cleared_by
            WHEN a.action = 'drain_node' AND n.node IS NOT NULL THEN 'its node is kept out'
            WHEN d.id IS NOT NULL THEN d.replica_set || CASE WHEN d.desired <> d.previous
                                            THEN ' ' || d.previous || ' -> ' || d.desired
                                            ELSE ' stays at ' || d.desired END || ', ' || d.reason
            WHEN a.status = 'resolved' THEN 'resolved'
            WHEN a.stale_since IS NOT NULL THEN 'stale: nobody confirms it'
            ELSE 'presses' END AS outcome,
       d.at AS decided_at,
       left(a.annotations->>'summary', 256) AS summary
  FROM alerts a
  LEFT JOIN nodes n ON n.node = a.labels->>'node' AND n.cause = 'alert' AND a.action = 'drain_node'
  LEFT JOIN LATERAL ( -- the newest decision that it had a part in; OFFSET: found by the alert, not by going back
       SELECT max(id) AS id
         FROM (SELECT id FROM decisions
                WHERE alerts @> ARRAY[a.source || '/' || a.org_id || '/' || a.fingerprint] OFFSET 0) named) newest ON true
  LEFT JOIN decisions d ON d.id = newest.id;

-- Each time that an alert began or ended, and how often it was told.
CREATE VIEW grafana.alert_deliveries AS
SELECT source,
       payload->'labels'->>'alertname' AS name,
       payload->'labels'->>'action' AS action,
       payload->'labels'->>'model' AS model,
       payload->'labels'->>'replica_set' AS replica_set,
       status,
       starts_at,
       first_received_at,
       last_received_at,
       deliveries
  FROM alert_deliveries;

-- Words of everybody but the reconciler. Of keys only whose they are.
CREATE VIEW grafana.operator_actions AS
SELECT a.at,
       a.actor,
       CASE a.kind WHEN 'API key' THEN CASE WHEN a.words LIKE '%revoked' THEN 'key revoked' ELSE 'key made' END
                   WHEN 'tenant' THEN 'limits changed'
                   ELSE substring(a.words FROM '^(?:all sets )?(\w+)') END AS verb,
       CASE a.kind WHEN 'API key' THEN 'tenant' ELSE a.kind END AS kind,
       CASE a.kind WHEN 'API key' THEN k.tenant ELSE a.subject END AS subject,
       substring(a.words FROM '\((.*)\)$') AS reason,
       regexp_replace(a.words, '\msk-\S*\s?', '', 'g') AS words
  FROM audit a LEFT JOIN api_keys k ON a.kind = 'API key' AND k.prefix = a.subject
UNION ALL
SELECT at, actor,
       coalesce(substring(explanation FROM '^(?:all sets )?(spec \w+|\w+) by '), 'term ended'),
       'replica set', replica_set, substring(explanation FROM '\((.*)\)$'), explanation
  FROM decisions WHERE actor <> 'reconciler'
UNION ALL
SELECT h.at, h.actor,
       CASE h.to_phase WHEN 'DRAINING' THEN 'drained' WHEN 'STOPPING' THEN 'cancelled' WHEN 'RUNNING' THEN 'undrained'
                       ELSE lower(h.to_phase) END,
       'replica', r.name, h.reason, coalesce(h.from_phase || ' -> ', '') || h.to_phase || coalesce(': ' || h.message, '')
  FROM replica_history h JOIN replicas r ON r.id = h.replica_id
 WHERE h.actor <> 'reconciler';

-- --- nodes ---------------------------------------------------------------------------------------------------

-- Nodes that jobs are kept off, one row for each cause; active: not one that was cleared and whose cause lasts.
CREATE VIEW grafana.nodes AS
SELECT n.node,
       n.cause,
       n.reason,
       n.actor,
       n.since,
       n.until,
       n.strikes,
       n.cleared_at IS NULL AS active,
       n.cleared_at,
       n.cleared_by,
       (SELECT count(*) FROM replicas r JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
         WHERE r.phase <> 'ENDED' AND (j.nodes = n.node OR j.nodes ~ '[[,]' AND n.node IN (
               WITH RECURSIVE names (name) AS ( -- of several nodes: Slurm's r[1-2]c[01-16],login is taken apart
                    SELECT part[1] FROM regexp_matches(j.nodes, '((?:[^],[]|\[[0-9,-]+\])+)', 'g') part
                    UNION ALL
                    SELECT part[1] || lpad(number::text, greatest(length(low), length(number::text)), '0') || part[3]
                      FROM names
                     CROSS JOIN regexp_matches(name, '^([^[]*)\[(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\](.*)$') part
                     CROSS JOIN unnest(string_to_array(part[2], ',')) span
                     CROSS JOIN split_part(span, '-', 1) low
                     CROSS JOIN coalesce(nullif(split_part(span, '-', 2), ''), low) high
                     CROSS JOIN generate_series(low::bigint, high::bigint) number)
               SELECT name FROM names))) AS replicas
  FROM nodes n;

CREATE VIEW grafana.node_events AS
SELECT at, node, cause, event, reason, until, actor FROM node_history;

-- --- tenants -------------------------------------------------------------------------------------------------

CREATE VIEW grafana.tenants AS
SELECT t.name AS tenant,
       t.requests_per_minute,
       t.tokens_per_minute,
       t.max_concurrent,
       t.monthly_tokens,
       t.weight,
       coalesce(m.tokens, 0) AS month_tokens,
       m.tokens::double precision / t.monthly_tokens AS budget_used, -- a ratio; NULL: no budget, or nothing used
       (SELECT count(*) FROM api_keys k
         WHERE k.tenant = t.name AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())) AS keys,
       (SELECT min(k.expires_at) FROM api_keys k
         WHERE k.tenant = t.name AND k.revoked_at IS NULL AND k.expires_at > now()) AS next_key_expires_at,
       t.created_at
  FROM tenants t
  LEFT JOIN tenant_months m
    ON m.tenant = t.name AND m.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date;

CREATE VIEW grafana.tenant_months AS
SELECT tenant, month, tokens FROM tenant_months;

-- gpu_seconds: of the replica's job on that day (UTC), up to now, shared out by tokens; as `controlplane usage` tells it
CREATE VIEW grafana.usage AS
SELECT u.day,
       u.tenant,
       u.model,
       nullif(u.replica_set, '') AS replica_set,
       nullif(u.replica, '') AS replica,
       u.requests,
       u.aborted,
       u.prompt_tokens,
       u.completion_tokens,
       u.cached_tokens,
       coalesce(burnt.gpu_seconds * (u.prompt_tokens + u.completion_tokens) / nullif(served.tokens, 0), 0)
           ::double precision AS gpu_seconds
  FROM usage u
  LEFT JOIN LATERAL (
       SELECT sum(r.gpus * extract(epoch FROM least(coalesce(r.ended_at, greatest(r.started_at, now())),
                                                    (u.day + 1)::timestamp AT TIME ZONE 'UTC')
                                              - greatest(r.started_at, u.day::timestamp AT TIME ZONE 'UTC')))
                  AS gpu_seconds
         FROM job_runs r
        WHERE r.replica = u.replica
          AND r.started_at < (u.day + 1)::timestamp AT TIME ZONE 'UTC'
          AND (r.ended_at IS NULL OR r.ended_at > u.day::timestamp AT TIME ZONE 'UTC')) burnt ON u.replica <> ''
  LEFT JOIN LATERAL (
       SELECT sum(o.prompt_tokens + o.completion_tokens) AS tokens
         FROM usage o WHERE o.replica = u.replica AND o.replica <> '' AND o.day = u.day) served ON u.replica <> '';

-- When jobs held how many GPUs, as Slurm told; ended_at NULL: they hold them.
CREATE VIEW grafana.job_runs AS
SELECT replica, replica_set, model, job_id AS slurm_job_id, gpus, started_at, ended_at,
       gpus * extract(epoch FROM coalesce(ended_at, greatest(started_at, now())) - started_at)::double precision
           AS gpu_seconds
  FROM job_runs;

-- What proxies keep waiting now. A worker that says nothing any more is gone, and what it kept with it.
CREATE VIEW grafana.held_requests AS
SELECT model, worker, held, queued, refreshed_at FROM held_requests;

-- --- the control plane itself --------------------------------------------------------------------------------

CREATE VIEW grafana.leases AS
SELECT name, holder, term, expires_at, expires_at > now() AS held FROM leases;
