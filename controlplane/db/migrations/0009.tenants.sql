-- Limits of tenants, what they used by day, what jobs' GPUs ran meanwhile, and how proxies tell each other what is used up.

ALTER TABLE tenants -- NULL: no limit
    ADD COLUMN requests_per_minute integer CHECK (requests_per_minute >= 1),
    ADD COLUMN tokens_per_minute   bigint CHECK (tokens_per_minute >= 1),
    ADD COLUMN max_concurrent      integer CHECK (max_concurrent >= 1),
    ADD COLUMN monthly_tokens      bigint CHECK (monthly_tokens >= 1),
    ADD COLUMN weight              double precision NOT NULL DEFAULT 1 CHECK (weight > 0 AND weight <= 1000);
CREATE TRIGGER announce AFTER INSERT OR UPDATE OR DELETE ON tenants
    FOR EACH STATEMENT EXECUTE FUNCTION announce_endpoints();

-- --- what was used -------------------------------------------------------------------------------------------

-- No foreign keys: what was used is told long after a replica, its set or its endpoint is forgotten.
CREATE TABLE usage (
    day               date NOT NULL, -- UTC, of the answer's end
    tenant            text NOT NULL,
    model             text NOT NULL,
    endpoint_id       bigint NOT NULL, -- 0: the request reached none
    replica_set       text NOT NULL,   -- '': no longer known
    replica           text NOT NULL,   -- '': Slurm does not run the endpoint
    requests          bigint NOT NULL,
    aborted           bigint NOT NULL,
    prompt_tokens     bigint NOT NULL, -- those that the prefix cache held included
    completion_tokens bigint NOT NULL,
    cached_tokens     bigint NOT NULL,
    PRIMARY KEY (day, tenant, model, endpoint_id)
);
CREATE INDEX usage_by_replica ON usage (replica, day) WHERE replica <> '';

CREATE TABLE usage_batches (
    -- the newest batch of each worker that is counted in usage: an older one, or the same again, is not counted
    worker    text PRIMARY KEY,
    batch     bigint NOT NULL,
    stored_at timestamptz NOT NULL
);

CREATE TABLE tenant_months (
    -- prompt and completion tokens of each month, written with usage: what budgets are judged by
    tenant text NOT NULL,
    month  date NOT NULL CHECK (month = date_trunc('month', month)),
    tokens bigint NOT NULL,
    PRIMARY KEY (tenant, month)
);

-- --- what GPUs ran -------------------------------------------------------------------------------------------

CREATE TABLE job_runs (
    -- from when to when a replica's job held its nodes, as Slurm told; a requeued job runs more than once
    replica     text NOT NULL,
    replica_set text NOT NULL,
    model       text NOT NULL,
    job_id      bigint NOT NULL,
    gpus        integer NOT NULL CHECK (gpus >= 0), -- of all of its nodes
    started_at  timestamptz NOT NULL,
    ended_at    timestamptz CHECK (ended_at >= started_at), -- NULL: it runs
    PRIMARY KEY (replica, job_id, started_at)
);
CREATE INDEX job_runs_by_end ON job_runs (ended_at);

CREATE FUNCTION remember_run() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    runs boolean := NEW.state IN ('RUNNING', 'SUSPENDED', 'COMPLETING');
    name text;
BEGIN
    IF NEW.state = 'UNKNOWN' THEN
        RETURN NULL;
    END IF;
    SELECT r.name INTO name FROM replicas r WHERE r.id = NEW.replica_id;
    IF NEW.state <> 'PENDING' THEN -- what is open with another start was requeued, and nobody saw it wait
        UPDATE job_runs SET ended_at = greatest(started_at, least(NEW.started_at, NEW.observed_at))
         WHERE replica = name AND job_id = NEW.job_id AND ended_at IS NULL AND started_at <> NEW.started_at;
    END IF;
    IF (runs AND NOT EXISTS (SELECT FROM job_runs WHERE replica = name AND job_id = NEW.job_id AND ended_at IS NULL))
        OR (NEW.state <> 'PENDING' AND NEW.ends_at > NEW.started_at) -- or it ran unseen
    THEN
        INSERT INTO job_runs (replica, replica_set, model, job_id, gpus, started_at)
        SELECT r.name, r.replica_set, coalesce(r.spec->>'model', ''), NEW.job_id,
               coalesce((r.spec->'slurm'->>'nodes')::integer, 1)
                   * coalesce((r.spec->'slurm'->>'gpus_per_node')::integer, 0),
               coalesce(NEW.started_at, NEW.observed_at)
          FROM replicas r WHERE r.id = NEW.replica_id
        ON CONFLICT DO NOTHING;
    END IF;
    IF NOT runs THEN -- over: by Slurm's own time, also where a guess was written down before; waiting: requeued
        UPDATE job_runs
           SET ended_at = greatest(started_at, CASE WHEN NEW.state = 'PENDING' THEN NEW.observed_at
                                                    ELSE coalesce(NEW.ends_at, ended_at, NEW.observed_at) END)
         WHERE replica = name AND job_id = NEW.job_id
           AND (ended_at IS NULL OR (NEW.state <> 'PENDING' AND started_at = NEW.started_at));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER remember_run AFTER INSERT ON slurm_jobs FOR EACH ROW
    WHEN (NEW.state <> 'PENDING') EXECUTE FUNCTION remember_run();
CREATE TRIGGER remember_run_change AFTER UPDATE ON slurm_jobs FOR EACH ROW
    WHEN (OLD.state IS DISTINCT FROM NEW.state
          OR (NEW.state <> 'PENDING' AND OLD.started_at IS DISTINCT FROM NEW.started_at))
    EXECUTE FUNCTION remember_run();

CREATE FUNCTION end_run() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN -- a job that Slurm no longer tells of
    UPDATE job_runs SET ended_at = greatest(started_at, NEW.ended_at) WHERE replica = NEW.name AND ended_at IS NULL;
    RETURN NULL;
END $$;
CREATE TRIGGER end_run AFTER UPDATE OF phase ON replicas FOR EACH ROW
    WHEN (NEW.phase = 'ENDED') EXECUTE FUNCTION end_run();

-- what ran before there was this table, as far as it is known still
INSERT INTO job_runs (replica, replica_set, model, job_id, gpus, started_at, ended_at)
SELECT r.name, r.replica_set, coalesce(r.spec->>'model', ''), j.job_id,
       coalesce((r.spec->'slurm'->>'nodes')::integer, 1) * coalesce((r.spec->'slurm'->>'gpus_per_node')::integer, 0),
       j.started_at,
       CASE WHEN j.state IN ('RUNNING', 'SUSPENDED', 'COMPLETING', 'UNKNOWN') AND r.phase <> 'ENDED' THEN NULL
            WHEN j.state IN ('RUNNING', 'SUSPENDED', 'COMPLETING', 'UNKNOWN') THEN greatest(j.started_at, r.ended_at)
            ELSE greatest(j.started_at, coalesce(j.ends_at, r.ended_at, j.observed_at)) END
  FROM slurm_jobs j JOIN replicas r ON r.id = j.replica_id
 WHERE j.state <> 'PENDING' AND j.started_at IS NOT NULL;

-- --- what proxies tell each other ----------------------------------------------------------------------------

-- Unlogged: it is of the last minutes, and each worker writes its own anew.
CREATE UNLOGGED TABLE proxy_workers (
    worker  text PRIMARY KEY,
    seen_at timestamptz NOT NULL
);

CREATE UNLOGGED TABLE limit_parts (
    -- what a worker has used of each limit of a tenant, and what more it may use before it asks again: the arrays are
    -- requests and tokens of the last minute, concurrent requests, tokens that usage does not hold yet
    worker text NOT NULL REFERENCES proxy_workers (worker) ON DELETE CASCADE,
    tenant text NOT NULL,
    used   bigint[] NOT NULL CHECK (cardinality(used) = 4),
    part   bigint[] NOT NULL CHECK (cardinality(part) = 4),
    PRIMARY KEY (worker, tenant)
);
