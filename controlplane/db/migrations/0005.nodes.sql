-- Nodes that new jobs are kept off, sets whose starts fail, and what a job's log said when it ended.

ALTER TABLE replicas DROP CONSTRAINT replicas_reason_check;
ALTER TABLE replicas ADD CONSTRAINT replicas_reason_check CHECK (
    reason IN ('SCALED_DOWN', 'ROLLED', 'REPLACED', 'DRAINED_BY_OPERATOR', 'CANCELLED_BY_OPERATOR', 'NODE_DRAINED',
               'HANDED_OVER', 'START_TIMEOUT', 'UNHEALTHY', 'REJECTED', 'LOST', 'CRASHED', 'TIME_LIMIT',
               'NODE_FAIL', 'PREEMPTED', 'CANCELLED_OUTSIDE'));
-- what ended lately is asked for by time, of all sets at once
CREATE INDEX ended_replicas_by_time ON replicas (ended_at) WHERE phase = 'ENDED';

CREATE TABLE nodes (
    -- one row for each cause to keep jobs off a node; one that was cleared remembers that, until its cause ends
    node       text NOT NULL CHECK (node ~ '^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$'),
    cause      text NOT NULL CHECK (cause IN ('operator', 'alert', 'failures')),
    actor      text NOT NULL,
    reason     text NOT NULL,
    since      timestamptz NOT NULL,
    until      timestamptz, -- NULL: until its cause ends, or it is cleared
    strikes    integer NOT NULL DEFAULT 0 CHECK (strikes >= 0),
    cleared_at timestamptz,
    cleared_by text,
    PRIMARY KEY (node, cause),
    CONSTRAINT cleared_says_by_whom CHECK ((cleared_at IS NULL) = (cleared_by IS NULL)),
    CONSTRAINT an_operators_mark_goes_when_cleared CHECK (cause <> 'operator' OR cleared_at IS NULL)
);

CREATE TABLE node_history (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL,
    node    text NOT NULL,
    cause   text NOT NULL,
    event   text NOT NULL CHECK (event IN ('kept_out', 'changed', 'cleared', 'ended')),
    reason  text NOT NULL,
    until   timestamptz,
    actor   text NOT NULL
);
CREATE INDEX node_history_by_node ON node_history (node, id DESC);

CREATE TABLE back_offs (
    -- one row for each set whose starts failed, or whose jobs were lost again and again, as of the newest round
    replica_set text PRIMARY KEY REFERENCES replica_sets (name) ON DELETE CASCADE,
    failures    integer NOT NULL DEFAULT 0 CHECK (failures >= 0),
    since       timestamptz,
    next_try_at timestamptz,
    replica     text, -- the newest that failed
    reason      text,
    message     text,
    forgiven_at timestamptz, -- an operator said to try again: what ended before does not count
    CONSTRAINT failures_say_when_it_is_tried_again CHECK ((failures > 0) = (next_try_at IS NOT NULL))
);

CREATE TABLE job_logs (
    -- the end of the log of a job that ended unasked; or why there is none
    replica_id bigint PRIMARY KEY REFERENCES replicas (id) ON DELETE CASCADE,
    read_at    timestamptz NOT NULL,
    tail       text,
    problem    text,
    CONSTRAINT a_tail_or_a_problem CHECK ((tail IS NULL) <> (problem IS NULL))
);
