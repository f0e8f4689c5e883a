-- Times are seconds since 1970-01-01 UTC, 0: never. Lists of tags and hosts are comma separated.
CREATE TABLE tokens (
    hash BLOB PRIMARY KEY, -- SHA-256 of the secret
    role TEXT NOT NULL,
    tags TEXT NOT NULL,
    all_agents INTEGER NOT NULL,
    may_replace INTEGER NOT NULL, -- a device enrolled with it may take the name of another
    uses_left INTEGER NOT NULL,
    expires INTEGER NOT NULL
) STRICT;

CREATE TABLE devices (
    id BLOB PRIMARY KEY,
    role TEXT NOT NULL,
    name TEXT NOT NULL,
    tags TEXT NOT NULL,
    hosts TEXT NOT NULL,
    public_key BLOB NOT NULL,
    token BLOB NOT NULL, -- the one that enrolled it
    certificate BLOB NOT NULL,
    enrolled INTEGER NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0,
    software TEXT NOT NULL DEFAULT '',
    address TEXT NOT NULL DEFAULT '',
    last_seen INTEGER NOT NULL DEFAULT 0,
    cloned INTEGER NOT NULL DEFAULT 0 -- two machines were seen with its key
) STRICT;
-- A revoked device keeps its row, and gives its name free.
CREATE UNIQUE INDEX devices_by_name ON devices (role, name) WHERE revoked = 0;
CREATE UNIQUE INDEX devices_by_key ON devices (public_key);

-- A technician reaches the agents that carry all tags of one of its grants.
CREATE TABLE grants (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    technician BLOB NOT NULL REFERENCES devices (id),
    tags TEXT NOT NULL,
    all_agents INTEGER NOT NULL,
    made INTEGER NOT NULL
) STRICT;

-- Signed lists of revoked certificates. The highest number counts.
CREATE TABLE revocations (number INTEGER PRIMARY KEY, list BLOB NOT NULL) STRICT;
-- The devices that the newest list has.
CREATE TABLE listed (device BLOB PRIMARY KEY REFERENCES devices (id)) STRICT;
