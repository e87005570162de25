-- Walltime hand-over: how long starts of a set take, whom a replica succeeds, and when an endpoint yields to others.

ALTER TABLE replica_sets
    ADD COLUMN start_lead_seconds     double precision, -- p95, from a replica's creation to its first readiness
    ADD COLUMN start_lead_starts      integer,          -- of how many starts
    ADD COLUMN start_lead_measured_at timestamptz,      -- when the newest of them became ready
    ADD CONSTRAINT a_measured_lead_is_whole CHECK (
        (start_lead_seconds IS NULL) = (start_lead_starts IS NULL)
        AND (start_lead_seconds IS NULL) = (start_lead_measured_at IS NULL));

-- no foreign key: the predecessor is forgotten first, and an ended successor is never changed again
ALTER TABLE replicas ADD COLUMN succeeds bigint;
CREATE INDEX live_successors ON replicas (succeeds) WHERE succeeds IS NOT NULL AND phase <> 'ENDED';

-- The newest 20 starts of the spec in force; where there are fewer than 3 of it, of any spec of the set.
CREATE FUNCTION measure_start_lead(measured_set text) RETURNS void LANGUAGE sql AS $$
    WITH starts AS (
        SELECT e.id, e.first_ready_at, extract(epoch FROM e.first_ready_at - r.created_at) AS took,
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
        SELECT greatest(0, percentile_cont(0.95) WITHIN GROUP (ORDER BY took)) AS p95, count(*) AS starts,
               max(first_ready_at) AS at
          FROM newest
    )
    UPDATE replica_sets s
       SET start_lead_seconds = m.p95, start_lead_starts = m.starts, start_lead_measured_at = m.at
      FROM measured m
     WHERE s.name = measured_set AND m.starts > 0
$$;

CREATE FUNCTION measure_after_a_start() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM measure_start_lead(NEW.replica_set);
    RETURN NULL;
END $$;
CREATE TRIGGER measure_start AFTER UPDATE OF first_ready_at ON endpoints FOR EACH ROW
    WHEN (NEW.replica_id IS NOT NULL AND OLD.first_ready_at IS DISTINCT FROM NEW.first_ready_at)
    EXECUTE FUNCTION measure_after_a_start();

DO $$ BEGIN
    PERFORM measure_start_lead(name) FROM replica_sets WHERE NOT is_external;
END $$;

-- with what says when an endpoint yields to others: the walltime, and the margin in force
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
       (s.spec->'hand_over'->>'margin_seconds')::integer AS hand_over_margin_seconds -- NULL: applied before there was one
  FROM endpoints e
  JOIN replica_sets s ON s.name = e.replica_set
  LEFT JOIN replicas r ON r.id = e.replica_id
  LEFT JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
 WHERE e.health = 'READY'
   AND NOT s.is_paused
   AND (e.replica_id IS NULL OR (r.phase = 'RUNNING' AND j.state = 'RUNNING'));

-- one truth about how long starts take: the lead
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
       max(s.start_lead_seconds) AS start_seconds_p95
  FROM replica_sets s
 GROUP BY s.model;
