-- A technician may use the redirector for the agents of this grant.
ALTER TABLE grants ADD COLUMN redirector INTEGER NOT NULL DEFAULT 0;
