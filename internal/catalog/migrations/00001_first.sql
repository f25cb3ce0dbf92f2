-- +goose Up

-- Ids are UUIDs in text form, times UTC nanoseconds; 0 or '' means none. What nodes report is kept
-- as they sent it: it is replaced by their next report.

CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE users (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    role       TEXT NOT NULL,
    created_ns BIGINT NOT NULL
);

CREATE TABLE api_tokens (
    id         TEXT PRIMARY KEY,
    user_id    TEXT NOT NULL REFERENCES users (id),
    name       TEXT NOT NULL,
    hash       BLOB NOT NULL,
    created_ns BIGINT NOT NULL,
    expires_ns BIGINT NOT NULL
);

CREATE TABLE join_tokens (
    id         TEXT PRIMARY KEY,
    hash       BLOB NOT NULL,
    role       TEXT NOT NULL,
    name       TEXT NOT NULL,
    created_ns BIGINT NOT NULL,
    expires_ns BIGINT NOT NULL,
    used_ns    BIGINT NOT NULL,
    used_by    TEXT NOT NULL,
    used_key   BLOB NOT NULL
);

CREATE TABLE nodes (
    id                  TEXT PRIMARY KEY,
    role                TEXT NOT NULL,
    name                TEXT NOT NULL,
    machine_id          TEXT NOT NULL,
    joined_ns           BIGINT NOT NULL,
    certificate_ends_ns BIGINT NOT NULL,
    removed_ns          BIGINT NOT NULL
);
CREATE INDEX nodes_by_role ON nodes (role, id);

CREATE TABLE machines (
    id               TEXT PRIMARY KEY,
    name             TEXT NOT NULL,
    node_id          TEXT NOT NULL REFERENCES nodes (id),
    created_ns       BIGINT NOT NULL,
    protected        BOOLEAN NOT NULL,
    retired          BOOLEAN NOT NULL,
    timeline         BIGINT NOT NULL,
    last_timeline    BIGINT NOT NULL,
    last_disk        BIGINT NOT NULL,
    process_server   TEXT NOT NULL,
    master_target    TEXT NOT NULL,
    history_window_s BIGINT NOT NULL,
    codec            TEXT NOT NULL,
    ring_bytes       BIGINT NOT NULL,
    memory_bytes     BIGINT NOT NULL,
    capture_driver   TEXT NOT NULL
);
CREATE INDEX machines_by_name ON machines (name, id);
CREATE INDEX machines_by_node ON machines (node_id);
CREATE INDEX machines_by_process_server ON machines (process_server);
CREATE INDEX machines_by_master_target ON machines (master_target);

-- A disk that is removed keeps its row, so that its id is never used again.
CREATE TABLE disks (
    machine_id TEXT NOT NULL REFERENCES machines (id),
    id         BIGINT NOT NULL,
    path       TEXT NOT NULL,
    size       BIGINT NOT NULL,
    added_ns   BIGINT NOT NULL,
    removed_ns BIGINT NOT NULL,
    PRIMARY KEY (machine_id, id)
);
CREATE UNIQUE INDEX disks_by_path ON disks (machine_id, path) WHERE removed_ns = 0;

CREATE TABLE tags (
    id          TEXT PRIMARY KEY,
    machine_id  TEXT NOT NULL REFERENCES machines (id),
    group_id    TEXT NOT NULL,
    name        TEXT NOT NULL,
    consistency BIGINT NOT NULL,
    created_ns  BIGINT NOT NULL,
    deadline_ns BIGINT NOT NULL,
    state       TEXT NOT NULL,
    timeline    BIGINT NOT NULL,
    seq         BIGINT NOT NULL,
    time_ns     BIGINT NOT NULL,
    error       TEXT NOT NULL
);
CREATE INDEX tags_by_machine ON tags (machine_id, state);
CREATE INDEX tags_by_state ON tags (state, deadline_ns);

CREATE TABLE views (
    id                TEXT PRIMARY KEY,
    machine_id        TEXT NOT NULL REFERENCES machines (id),
    master_target     TEXT NOT NULL,
    name              TEXT NOT NULL,
    selector          TEXT NOT NULL,
    selector_timeline BIGINT NOT NULL,
    selector_seq      BIGINT NOT NULL,
    selector_time_ns  BIGINT NOT NULL,
    selector_tag      TEXT NOT NULL,
    writable          BOOLEAN NOT NULL,
    disks             TEXT NOT NULL,
    created_ns        BIGINT NOT NULL,
    closing           BOOLEAN NOT NULL,
    resolved          BOOLEAN NOT NULL,
    resolved_timeline BIGINT NOT NULL,
    resolved_seq      BIGINT NOT NULL,
    branch_timeline   BIGINT NOT NULL
);
CREATE INDEX views_by_master_target ON views (master_target, created_ns);
CREATE INDEX views_by_machine ON views (machine_id, created_ns);

CREATE TABLE reports (
    node_id     TEXT PRIMARY KEY REFERENCES nodes (id),
    received_ns BIGINT NOT NULL,
    body        BLOB NOT NULL
);

CREATE TABLE assignments (
    node_id  TEXT PRIMARY KEY REFERENCES nodes (id),
    revision BIGINT NOT NULL,
    digest   BLOB NOT NULL
);

-- +goose Down
DROP TABLE assignments;
DROP TABLE reports;
DROP TABLE views;
DROP TABLE tags;
DROP TABLE disks;
DROP TABLE machines;
DROP TABLE nodes;
DROP TABLE join_tokens;
DROP TABLE api_tokens;
DROP TABLE users;
DROP TABLE settings;
