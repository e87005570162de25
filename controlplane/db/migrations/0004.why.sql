-- What `why` needs to tell, which the newest row of each noun does not: what Slurm and the probes said before, what a
-- replica was made for, how the alerts stood when a decision was taken, and who said what where no noun keeps it.
--
-- The histories are written by triggers: in the statement that changes the noun, whoever changes it.

CREATE TABLE slurm_job_history (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    replica_id    bigint NOT NULL REFERENCES replicas (id) ON DELETE CASCADE,
    job_id        bigint NOT NULL,
    at            timestamptz NOT NULL,
    state         text NOT NULL,
    raw_state     text NOT NULL,
    state_reason  text NOT NULL,
    is_held       boolean NOT NULL,
    nodes         text NOT NULL,
    restart_count integer NOT NULL
);
CREATE INDEX slurm_job_history_by_replica ON slurm_job_history (replica_id, id);

CREATE FUNCTION remember_slurm_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO slurm_job_history (replica_id, job_id, at, state, raw_state, state_reason, is_held, nodes, restart_count)
    VALUES (NEW.replica_id, NEW.job_id, NEW.observed_at, NEW.state, NEW.raw_state, NEW.state_reason, NEW.is_held,
            NEW.nodes, NEW.restart_count);
    RETURN NULL;
END $$;
CREATE TRIGGER remember AFTER INSERT ON slurm_jobs FOR EACH ROW EXECUTE FUNCTION remember_slurm_job();
-- Slurm's reasons are words, some followed by lists of nodes that change all the time
CREATE TRIGGER remember_change AFTER UPDATE ON slurm_jobs FOR EACH ROW
    WHEN ((OLD.state, OLD.raw_state, substring(OLD.state_reason from '^\w*'), OLD.is_held, OLD.nodes, OLD.restart_count)
          IS DISTINCT FROM
          (NEW.state, NEW.raw_state, substring(NEW.state_reason from '^\w*'), NEW.is_held, NEW.nodes, NEW.restart_count))
    EXECUTE FUNCTION remember_slurm_job();
INSERT INTO slurm_job_history (replica_id, job_id, at, state, raw_state, state_reason, is_held, nodes, restart_count)
SELECT replica_id, job_id, observed_at, state, raw_state, state_reason, is_held, nodes, restart_count
  FROM slurm_jobs ORDER BY replica_id, job_id;

CREATE TABLE endpoint_history (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    endpoint_id bigint NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
    at          timestamptz NOT NULL,
    health      text NOT NULL,
    url         text NOT NULL,
    message     text
);
CREATE INDEX endpoint_history_by_endpoint ON endpoint_history (endpoint_id, id);
CREATE INDEX endpoint_history_by_time ON endpoint_history (at);

CREATE FUNCTION remember_endpoint() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    happened_at timestamptz := now(); -- when it was found or moved, of which its row does not tell
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.probed_at IS DISTINCT FROM OLD.probed_at THEN
        happened_at := NEW.probed_at;
    END IF;
    INSERT INTO endpoint_history (endpoint_id, at, health, url, message)
    VALUES (NEW.id, happened_at, NEW.health, NEW.url, CASE WHEN NEW.health = 'FAILING' THEN NEW.message END);
    RETURN NULL;
END $$;
CREATE TRIGGER remember AFTER INSERT ON endpoints FOR EACH ROW EXECUTE FUNCTION remember_endpoint();
CREATE TRIGGER remember_change AFTER UPDATE ON endpoints FOR EACH ROW
    WHEN (OLD.health IS DISTINCT FROM NEW.health OR OLD.url IS DISTINCT FROM NEW.url)
    EXECUTE FUNCTION remember_endpoint();
INSERT INTO endpoint_history (endpoint_id, at, health, url, message)
SELECT id, coalesce(CASE health WHEN 'READY' THEN first_ready_at WHEN 'FAILING' THEN failing_since END, created_at),
       health, url, CASE WHEN health = 'FAILING' THEN message END
  FROM endpoints ORDER BY id;

-- the alerts that pressed, as they were: alerts are levels, and the next delivery writes over them
ALTER TABLE decisions ADD COLUMN evidence jsonb NOT NULL DEFAULT '[]';

-- what a replica was made for. Neither refers to a row that may be forgotten before it: a decision is kept as long as
-- its replicas, and a name is good for ever.
ALTER TABLE replicas
    ADD COLUMN decision_id bigint REFERENCES decisions (id),
    ADD COLUMN replaces text;
CREATE INDEX replicas_by_decision ON replicas (decision_id);
CREATE INDEX replicas_by_what_they_replace ON replicas (replaces) WHERE replaces IS NOT NULL;

CREATE TABLE audit (
    -- who said what, of what leaves no decision and no step of a replica: those tables say it themselves
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL,
    actor   text NOT NULL CHECK (actor <> ''),
    kind    text NOT NULL, -- of the subject
    subject text NOT NULL,
    words   text NOT NULL
);
CREATE INDEX audit_by_time ON audit (at);

CREATE VIEW said AS
SELECT at, actor, kind, subject, words FROM audit
UNION ALL
SELECT at, actor, 'replica set', replica_set, explanation FROM decisions WHERE actor <> 'reconciler'
UNION ALL
SELECT h.at, h.actor, 'replica', r.name,
       coalesce(h.message, h.reason, '') || ': ' || coalesce(h.from_phase || ' -> ', '') || h.to_phase
  FROM replica_history h JOIN replicas r ON r.id = h.replica_id
 WHERE h.actor <> 'reconciler';
