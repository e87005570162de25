-- Requests that proxies keep waiting: they press like alerts, and are told how long a start takes.

ALTER TABLE alerts DROP CONSTRAINT alerts_source_check;
ALTER TABLE alerts ADD CONSTRAINT alerts_source_check CHECK (source IN ('grafana', 'alertmanager', 'proxy'));

CREATE TABLE held_requests (
    -- what each worker of a proxy keeps waiting, for a model that asks for a replica; the alert of source proxy is made
    -- of these rows: it fires while there is one. A row that is not refreshed is of a worker that is gone.
    model        text NOT NULL,
    worker       text NOT NULL,
    held         integer NOT NULL CHECK (held >= 0), -- nothing is routable
    queued       integer NOT NULL CHECK (queued >= 0), -- every replica has as much to do as it may
    refreshed_at timestamptz NOT NULL,
    PRIMARY KEY (model, worker)
);

-- with the engine's arguments: they say how many requests it runs at once
CREATE OR REPLACE VIEW routable_endpoints AS
SELECT e.id AS endpoint_id,
       coalesce(r.spec->>'model', s.model) AS model, -- a replica serves what it was started for
       s.name AS replica_set,
       s.priority,
       r.name AS replica,
       e.url,
       e.api_key,
       e.first_ready_at,
       j.ends_at,
       r.running_since,
       (s.spec->'hand_over'->>'margin_seconds')::integer AS hand_over_margin_seconds, -- NULL: applied before there was one
       s.spec->'routing' AS routing, -- the set's, not the replica's: no replica is rolled for it; NULL as above
       coalesce(r.spec, s.spec)->'vllm'->'args' AS vllm_args -- those it was started with
  FROM endpoints e
  JOIN replica_sets s ON s.name = e.replica_set
  LEFT JOIN replicas r ON r.id = e.replica_id
  LEFT JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
 WHERE e.health = 'READY'
   AND NOT s.is_paused
   AND (e.replica_id IS NULL OR (r.phase = 'RUNNING' AND j.state = 'RUNNING'));

-- how much of a start is the load: the rest is Slurm's queue, which Slurm itself may have an estimate of
ALTER TABLE replica_sets ADD COLUMN load_seconds double precision; -- p95, from the job's begin to the first readiness

CREATE OR REPLACE FUNCTION measure_start_lead(measured_set text) RETURNS void LANGUAGE sql AS $$
    WITH starts AS (
        SELECT e.id, e.first_ready_at, extract(epoch FROM e.first_ready_at - r.created_at) AS took,
               extract(epoch FROM e.first_ready_at - r.running_since) AS loaded,
               r.spec_hash = s.spec_hash AS is_current
          FROM replica_sets s
          JOIN replicas r ON r.replica_set = s.name
          JOIN endpoints e ON e.replica_id = r.id
         WHERE s.name = measured_set AND e.first_ready_at IS NOT NULL
    ), newest AS (
        SELECT * FROM starts
         WHERE is_current OR (SELECT count(*) FROM starts WHERE is_current) < 3
         ORDER BY id DESC LIMIT 20
    ), measured AS (
        SELECT greatest(0, percentile_cont(0.95) WITHIN GROUP (ORDER BY took)) AS p95,
               greatest(0, percentile_cont(0.95) WITHIN GROUP (ORDER BY loaded)) AS loaded_p95,
               count(*) AS starts, max(first_ready_at) AS at
          FROM newest
    )
    UPDATE replica_sets s
       SET start_lead_seconds = m.p95, load_seconds = m.loaded_p95, start_lead_starts = m.starts,
           start_lead_measured_at = m.at
      FROM measured m
     WHERE s.name = measured_set AND m.starts > 0
$$;
DO $$ BEGIN
    PERFORM measure_start_lead(name) FROM replica_sets WHERE NOT is_external;
END $$;

-- Slurm's estimate of a job that waits is its `started_at`: the field means that until the job runs
CREATE OR REPLACE VIEW served_models AS
SELECT s.model,
       min(s.created_at) AS created_at,
       bool_and(s.is_paused) AS is_paused,
       min(s.paused_until) FILTER (WHERE s.is_paused) AS paused_until,
       (SELECT count(*) FROM routable_endpoints e WHERE e.model = s.model) AS routable,
       (SELECT min(r.created_at)
          FROM replicas r JOIN replica_sets t ON t.name = r.replica_set
         WHERE t.model = s.model AND r.phase IN ('PENDING', 'SUBMITTING', 'QUEUED', 'RUNNING')
           AND NOT EXISTS (SELECT FROM endpoints e WHERE e.replica_id = r.id AND e.health = 'READY')) AS starting_since,
       max(s.start_lead_seconds) AS start_seconds_p95,
       bool_or(NOT s.is_external AND NOT s.is_paused AND s.max_replicas > 0
               AND (s.desired_replicas > 0
                    OR (coalesce(s.spec->>'mode', 'active') <> 'advisory'
                        AND coalesce(s.spec->'scale_up'->>'select_policy', 'Max') <> 'Disabled'
                        AND coalesce(s.pinned_replicas, 1) > 0
                        AND NOT EXISTS (SELECT FROM freezes f
                                         WHERE f.replica_set IS NULL OR f.replica_set = s.name)))) AS can_start,
       max(s.load_seconds) AS load_seconds_p95,
       (SELECT min(r.running_since)
          FROM replicas r JOIN replica_sets t ON t.name = r.replica_set
         WHERE t.model = s.model AND r.phase = 'RUNNING'
           AND NOT EXISTS (SELECT FROM endpoints e WHERE e.replica_id = r.id AND e.health = 'READY')) AS loading_since,
       (SELECT min(j.started_at)
          FROM replicas r JOIN replica_sets t ON t.name = r.replica_set
          JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
         WHERE t.model = s.model AND r.phase = 'QUEUED' AND j.state = 'PENDING') AS expected_start_at
  FROM replica_sets s
 GROUP BY s.model;

-- whether it is worth while to wait for a model is news for the proxies
CREATE TRIGGER announce_bounds AFTER UPDATE ON replica_sets FOR EACH ROW
    WHEN ((OLD.max_replicas > 0) IS DISTINCT FROM (NEW.max_replicas > 0)
          OR (OLD.desired_replicas > 0) IS DISTINCT FROM (NEW.desired_replicas > 0)
          OR OLD.pinned_replicas IS DISTINCT FROM NEW.pinned_replicas)
    EXECUTE FUNCTION announce_endpoints();
CREATE TRIGGER announce AFTER INSERT OR UPDATE OR DELETE ON freezes
    FOR EACH STATEMENT EXECUTE FUNCTION announce_endpoints();
-- a job's estimate is not: it changes often, and the proxies read everything every few seconds
