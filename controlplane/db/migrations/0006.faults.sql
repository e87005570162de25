-- What the deadline of a drain cost: kept with the replica, and counted as controlplane_requests_cut_total.

ALTER TABLE replicas ADD COLUMN cut_requests integer CHECK (cut_requests >= 0); -- NULL: it did not pass, or nobody knows
