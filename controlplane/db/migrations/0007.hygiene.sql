-- A firing alert that nobody confirms any more presses nothing; since when that is known, so that it is told once.
ALTER TABLE alerts ADD COLUMN stale_since timestamptz;
