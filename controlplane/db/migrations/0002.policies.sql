-- What operators and schedules say about counts, each for itself: the bounds in force are made of them, and when one
-- ends the others stand again. min_replicas, max_replicas and desired_replicas stay what is in force.

ALTER TABLE replica_sets
    ADD COLUMN operator_min   integer CHECK (operator_min >= 0),
    ADD COLUMN operator_max   integer CHECK (operator_max >= 0),
    ADD COLUMN bounds_until   timestamptz,
    ADD COLUMN open_schedules text[] NOT NULL DEFAULT '{}',
    ADD COLUMN scheduled_min  integer CHECK (scheduled_min >= 0),
    ADD COLUMN scheduled_max  integer CHECK (scheduled_max >= 0),
    ADD COLUMN pinned_replicas integer CHECK (pinned_replicas >= 0),
    ADD COLUMN pinned_until   timestamptz,
    ADD COLUMN pinned_by      text,
    ADD COLUMN pinned_reason  text,
    ADD CONSTRAINT bounds_that_end_are_given CHECK (
        bounds_until IS NULL OR operator_min IS NOT NULL OR operator_max IS NOT NULL),
    ADD CONSTRAINT open_schedules_give_bounds CHECK (
        open_schedules <> '{}' OR (scheduled_min IS NULL AND scheduled_max IS NULL)),
    ADD CONSTRAINT a_pin_says_until_when_and_who CHECK (
        (pinned_replicas IS NULL) = (pinned_until IS NULL) AND (pinned_replicas IS NULL) = (pinned_by IS NULL)
        AND (pinned_replicas IS NOT NULL OR pinned_reason IS NULL));

-- bounds in force that are not the spec's were an operator's
UPDATE replica_sets SET operator_min = min_replicas
 WHERE NOT is_external AND min_replicas IS DISTINCT FROM (spec->>'min_replicas')::integer;
UPDATE replica_sets SET operator_max = max_replicas
 WHERE NOT is_external AND max_replicas IS DISTINCT FROM (spec->>'max_replicas')::integer;

CREATE TABLE freezes (
    replica_set text REFERENCES replica_sets (name) ON DELETE CASCADE, -- NULL: every set, those included that are to come
    actor       text NOT NULL,
    reason      text,
    since       timestamptz NOT NULL,
    until       timestamptz
);
CREATE UNIQUE INDEX one_freeze_per_set ON freezes (coalesce(replica_set, ''));

-- policies count the changes of their period
CREATE INDEX decisions_that_changed ON decisions (at) WHERE previous <> desired;
