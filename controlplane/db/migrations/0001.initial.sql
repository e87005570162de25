-- The first schema: what is intended, what was seen, and what was decided.
--
-- Invariants are stated here as CHECKs and unique indexes, because the last writer is not always our code.
-- Times are timestamptz; durations are integers that end in _seconds; phases are text + CHECK; foreign payloads are jsonb.

CREATE TABLE installation (
    -- exactly one row: tells this installation's Slurm jobs from those of another one under the same Slurm user
    is_singleton boolean PRIMARY KEY DEFAULT true CHECK (is_singleton),
    instance_id  text NOT NULL DEFAULT replace(gen_random_uuid()::text, '-', '')
);
INSERT INTO installation DEFAULT VALUES;

-- --- what is wanted ------------------------------------------------------------------------------------------

CREATE TABLE replica_sets (
    name             text PRIMARY KEY CHECK (name ~ '^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$'),
    model            text NOT NULL CHECK (model <> ''),
    priority         integer NOT NULL,
    is_external      boolean NOT NULL,
    spec             jsonb NOT NULL,
    spec_hash        text NOT NULL,
    min_replicas     integer NOT NULL CHECK (min_replicas >= 0),
    max_replicas     integer NOT NULL CHECK (max_replicas >= min_replicas),
    desired_replicas integer NOT NULL,
    is_paused        boolean NOT NULL DEFAULT false,
    paused_reason    text,
    paused_until     timestamptz,
    scaled_up_at     timestamptz,
    scaled_down_at   timestamptz,
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT desired_within_bounds CHECK (desired_replicas BETWEEN min_replicas AND max_replicas),
    CONSTRAINT only_slurm_sets_scale CHECK (NOT is_external OR max_replicas = 0),
    CONSTRAINT only_paused_sets_say_why CHECK (is_paused OR (paused_reason IS NULL AND paused_until IS NULL))
);
CREATE INDEX replica_sets_by_model ON replica_sets (model);

CREATE TABLE replicas (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name           text NOT NULL UNIQUE,
    replica_set    text NOT NULL REFERENCES replica_sets (name),
    phase          text NOT NULL DEFAULT 'PENDING' CHECK (
                       phase IN ('PENDING', 'SUBMITTING', 'QUEUED', 'RUNNING', 'DRAINING', 'STOPPING', 'ENDED')),
    reason         text CHECK (
                       reason IN ('SCALED_DOWN', 'ROLLED', 'REPLACED', 'DRAINED_BY_OPERATOR', 'CANCELLED_BY_OPERATOR',
                                  'HANDED_OVER', 'START_TIMEOUT', 'UNHEALTHY', 'REJECTED', 'LOST', 'CRASHED', 'TIME_LIMIT',
                                  'NODE_FAIL', 'PREEMPTED', 'CANCELLED_OUTSIDE')),
    message        text,
    version        integer NOT NULL DEFAULT 1,
    spec           jsonb NOT NULL,
    spec_hash      text NOT NULL,
    port           integer NOT NULL CHECK (port BETWEEN 1024 AND 65535),
    secret         text NOT NULL CHECK (length(secret) >= 32),
    slurm_job_id   bigint CHECK (slurm_job_id > 0),
    created_at     timestamptz NOT NULL,
    phase_since    timestamptz NOT NULL,
    submitted_at   timestamptz,
    running_since  timestamptz,
    drain_deadline timestamptz,
    idle_since     timestamptz,
    ended_at       timestamptz,
    CONSTRAINT name_is_unique_for_ever CHECK (name = 'cp-' || replica_set || '-' || id),
    CONSTRAINT nothing_asked_while_pending CHECK (phase <> 'PENDING' OR slurm_job_id IS NULL),
    CONSTRAINT submitting_says_since_when CHECK (phase <> 'SUBMITTING' OR submitted_at IS NOT NULL),
    CONSTRAINT a_known_job_has_an_id CHECK (
        phase NOT IN ('QUEUED', 'RUNNING', 'DRAINING') OR slurm_job_id IS NOT NULL),
    CONSTRAINT running_says_since_when CHECK (phase NOT IN ('RUNNING', 'DRAINING') OR running_since IS NOT NULL),
    CONSTRAINT draining_has_a_deadline CHECK (phase <> 'DRAINING' OR drain_deadline IS NOT NULL),
    CONSTRAINT leaving_has_a_reason CHECK (phase NOT IN ('DRAINING', 'STOPPING', 'ENDED') OR reason IS NOT NULL),
    CONSTRAINT ended_says_when CHECK ((phase = 'ENDED') = (ended_at IS NOT NULL))
);
-- one live replica per job, and per port: a live port is never given twice
CREATE UNIQUE INDEX one_live_replica_per_job ON replicas (slurm_job_id) WHERE phase <> 'ENDED';
CREATE UNIQUE INDEX one_live_replica_per_port ON replicas (port) WHERE phase <> 'ENDED';
CREATE INDEX live_replicas_by_set ON replicas (replica_set) WHERE phase <> 'ENDED';
CREATE INDEX ended_replicas_by_set ON replicas (replica_set, ended_at DESC) WHERE phase = 'ENDED';

CREATE FUNCTION ended_is_final() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'replica % has ended: it is never changed again', OLD.name USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER ended_is_final BEFORE UPDATE ON replicas
    FOR EACH ROW WHEN (OLD.phase = 'ENDED') EXECUTE FUNCTION ended_is_final();

CREATE TABLE replica_history (
    replica_id   bigint NOT NULL REFERENCES replicas (id) ON DELETE CASCADE,
    version      integer NOT NULL, -- the replica's version after this step: one row a step, or the guard was broken
    at           timestamptz NOT NULL,
    from_phase   text,
    to_phase     text NOT NULL,
    reason       text,
    message      text,
    slurm_job_id bigint,
    actor        text NOT NULL,
    PRIMARY KEY (replica_id, version)
);
CREATE INDEX replica_history_by_time ON replica_history (at);

-- --- what was seen -------------------------------------------------------------------------------------------

CREATE TABLE slurm_jobs (
    replica_id    bigint NOT NULL REFERENCES replicas (id) ON DELETE CASCADE,
    job_id        bigint NOT NULL CHECK (job_id > 0),
    state         text NOT NULL,
    raw_state     text NOT NULL,
    state_reason  text NOT NULL DEFAULT '',
    is_held       boolean NOT NULL DEFAULT false,
    nodes         text NOT NULL DEFAULT '',
    submitted_at  timestamptz,
    started_at    timestamptz,
    ends_at       timestamptz,
    exit_code     integer,
    signal        integer,
    restart_count integer NOT NULL DEFAULT 0,
    observed_at   timestamptz NOT NULL,
    PRIMARY KEY (replica_id, job_id)
);
CREATE INDEX slurm_jobs_by_id ON slurm_jobs (job_id);

CREATE TABLE endpoints (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    replica_set      text NOT NULL REFERENCES replica_sets (name) ON DELETE CASCADE,
    replica_id       bigint UNIQUE REFERENCES replicas (id) ON DELETE CASCADE,
    url              text NOT NULL CHECK (url ~ '^https?://'),
    api_key          text,
    health           text NOT NULL DEFAULT 'UNPROVEN' CHECK (health IN ('UNPROVEN', 'READY', 'FAILING')),
    passes           integer NOT NULL DEFAULT 0,
    fails            integer NOT NULL DEFAULT 0,
    first_ready_at   timestamptz,
    failing_since    timestamptz,
    probed_at        timestamptz,
    confirmed_at     timestamptz,
    running          integer,
    waiting          integer,
    generated_tokens double precision,
    message          text,
    created_at       timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT ready_was_confirmed CHECK (health <> 'READY' OR (first_ready_at IS NOT NULL AND confirmed_at IS NOT NULL)),
    CONSTRAINT a_replicas_endpoint_is_secret CHECK (replica_id IS NULL OR api_key IS NOT NULL)
);
CREATE UNIQUE INDEX one_external_endpoint_per_url ON endpoints (replica_set, url) WHERE replica_id IS NULL;

-- --- alerts and decisions ------------------------------------------------------------------------------------

CREATE TABLE alerts (
    source         text NOT NULL CHECK (source IN ('grafana', 'alertmanager')),
    org_id         bigint NOT NULL,
    fingerprint    text NOT NULL,
    alertname      text NOT NULL,
    status         text NOT NULL CHECK (status IN ('firing', 'resolved')),
    starts_at      timestamptz NOT NULL,
    ends_at        timestamptz,
    refreshed_at   timestamptz NOT NULL,
    labels         jsonb NOT NULL,
    annotations    jsonb NOT NULL,
    values         jsonb NOT NULL,
    action         text CHECK (action IN ('scale_up', 'scale_down', 'replace', 'drain_node')),
    step           integer CHECK (step >= 1),
    ignored_reason text,
    PRIMARY KEY (source, org_id, fingerprint),
    CONSTRAINT acted_upon_or_ignored CHECK ((action IS NULL) = (ignored_reason IS NOT NULL)),
    CONSTRAINT resolved_has_an_end CHECK (status = 'firing' OR ends_at IS NOT NULL)
);
CREATE INDEX alerts_by_refresh ON alerts (refreshed_at);

CREATE TABLE alert_deliveries (
    source            text NOT NULL,
    org_id            bigint NOT NULL,
    fingerprint       text NOT NULL,
    starts_at         timestamptz NOT NULL,
    status            text NOT NULL CHECK (status IN ('firing', 'resolved')),
    payload           jsonb NOT NULL, -- the newest body of this alert, as it came
    first_received_at timestamptz NOT NULL,
    last_received_at  timestamptz NOT NULL,
    deliveries        integer NOT NULL DEFAULT 1,
    PRIMARY KEY (source, org_id, fingerprint, starts_at, status)
);
CREATE INDEX alert_deliveries_by_time ON alert_deliveries (last_received_at);

CREATE TABLE webhook_signatures (
    -- a signature is good once: a second delivery of the same one inside its time window is a replay
    signature  bytea PRIMARY KEY,
    expires_at timestamptz NOT NULL
);

CREATE TABLE decisions (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,
    replica_set text NOT NULL REFERENCES replica_sets (name) ON DELETE CASCADE,
    reason      text NOT NULL,
    previous    integer NOT NULL,
    desired     integer NOT NULL,
    explanation text NOT NULL,
    alerts      text[] NOT NULL DEFAULT '{}',
    actor       text NOT NULL
);
CREATE INDEX decisions_by_set ON decisions (replica_set, id DESC);

CREATE TABLE leases (
    name       text PRIMARY KEY,
    holder     text NOT NULL,
    term       bigint NOT NULL,
    expires_at timestamptz NOT NULL
);

-- --- who may ask ---------------------------------------------------------------------------------------------

CREATE TABLE tenants (
    name       text PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9]([A-Za-z0-9_.@-]{0,62}[A-Za-z0-9])?$'),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_keys (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant     text NOT NULL REFERENCES tenants (name),
    prefix     text NOT NULL UNIQUE, -- shown to people; the key itself is never stored
    key_hash   bytea NOT NULL UNIQUE, -- SHA-256 of the whole key, which has 256 random bits: no salt is needed
    models     text[], -- NULL: every model
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz
);

-- --- what the proxy reads ------------------------------------------------------------------------------------

CREATE VIEW routable_endpoints AS
SELECT e.id AS endpoint_id,
       coalesce(r.spec->>'model', s.model) AS model, -- a replica serves what it was started for
       s.name AS replica_set,
       s.priority,
       r.name AS replica,
       e.url,
       e.api_key,
       e.first_ready_at,
       j.ends_at
  FROM endpoints e
  JOIN replica_sets s ON s.name = e.replica_set
  LEFT JOIN replicas r ON r.id = e.replica_id
  LEFT JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
 WHERE e.health = 'READY'
   AND NOT s.is_paused
   AND (e.replica_id IS NULL OR (r.phase = 'RUNNING' AND j.state = 'RUNNING'));

CREATE VIEW served_models AS
SELECT s.model,
       min(s.created_at) AS created_at,
       bool_and(s.is_paused) AS is_paused,
       min(s.paused_until) FILTER (WHERE s.is_paused) AS paused_until,
       (SELECT count(*) FROM routable_endpoints e WHERE e.model = s.model) AS routable,
       (SELECT min(r.created_at)
          FROM replicas r JOIN replica_sets t ON t.name = r.replica_set
         WHERE t.model = s.model AND r.phase IN ('PENDING', 'SUBMITTING', 'QUEUED', 'RUNNING')
           AND NOT EXISTS (SELECT FROM endpoints e WHERE e.replica_id = r.id AND e.health = 'READY')) AS starting_since,
       (SELECT extract(epoch FROM percentile_cont(0.95) WITHIN GROUP (ORDER BY q.took))
          FROM (SELECT e.first_ready_at - r.created_at AS took
                  FROM endpoints e
                  JOIN replicas r ON r.id = e.replica_id
                  JOIN replica_sets t ON t.name = r.replica_set
                 WHERE t.model = s.model AND e.first_ready_at IS NOT NULL
                 ORDER BY e.id DESC LIMIT 20) q)::double precision AS start_seconds_p95
  FROM replica_sets s
 GROUP BY s.model;

-- What changes routing or keys is announced in the same transaction, whoever writes it.
CREATE FUNCTION announce_endpoints() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('controlplane_endpoints', '');
    RETURN NULL;
END $$;

CREATE TRIGGER announce AFTER INSERT OR DELETE ON endpoints
    FOR EACH STATEMENT EXECUTE FUNCTION announce_endpoints();
CREATE TRIGGER announce_change AFTER UPDATE ON endpoints FOR EACH ROW
    WHEN (OLD.health IS DISTINCT FROM NEW.health OR OLD.url IS DISTINCT FROM NEW.url
          OR OLD.api_key IS DISTINCT FROM NEW.api_key)
    EXECUTE FUNCTION announce_endpoints();
CREATE TRIGGER announce_change AFTER UPDATE ON replicas FOR EACH ROW
    WHEN (OLD.phase IS DISTINCT FROM NEW.phase) EXECUTE FUNCTION announce_endpoints();
CREATE TRIGGER announce_change AFTER UPDATE ON slurm_jobs FOR EACH ROW
    WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.ends_at IS DISTINCT FROM NEW.ends_at)
    EXECUTE FUNCTION announce_endpoints();
CREATE TRIGGER announce AFTER INSERT OR DELETE ON replica_sets
    FOR EACH STATEMENT EXECUTE FUNCTION announce_endpoints();
CREATE TRIGGER announce_change AFTER UPDATE ON replica_sets FOR EACH ROW
    WHEN (OLD.model IS DISTINCT FROM NEW.model OR OLD.is_paused IS DISTINCT FROM NEW.is_paused
          OR OLD.paused_until IS DISTINCT FROM NEW.paused_until)
    EXECUTE FUNCTION announce_endpoints();
CREATE TRIGGER announce AFTER INSERT OR UPDATE OR DELETE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION announce_endpoints();
