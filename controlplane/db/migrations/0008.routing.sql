-- How requests are shared out is said by a set's spec, and is the proxies' alone: they are given it with the endpoints.

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
       s.spec->'routing' AS routing -- the set's, not the replica's: no replica is rolled for it; NULL as above
  FROM endpoints e
  JOIN replica_sets s ON s.name = e.replica_set
  LEFT JOIN replicas r ON r.id = e.replica_id
  LEFT JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
 WHERE e.health = 'READY'
   AND NOT s.is_paused
   AND (e.replica_id IS NULL OR (r.phase = 'RUNNING' AND j.state = 'RUNNING'));

-- the set with the best priority says how its model is routed
CREATE TRIGGER announce_routing AFTER UPDATE ON replica_sets FOR EACH ROW
    WHEN (OLD.spec->'routing' IS DISTINCT FROM NEW.spec->'routing' OR OLD.priority IS DISTINCT FROM NEW.priority)
    EXECUTE FUNCTION announce_endpoints();
