-- +goose Up

CREATE TABLE replication_groups (
    id             TEXT PRIMARY KEY,
    name           TEXT NOT NULL UNIQUE,
    hold_limit_ms  BIGINT NOT NULL,
    tag_every_s    BIGINT NOT NULL,
    consistency    BIGINT NOT NULL,
    created_ns     BIGINT NOT NULL
);

CREATE TABLE group_members (
    machine_id TEXT PRIMARY KEY REFERENCES machines (id),
    group_id   TEXT NOT NULL REFERENCES replication_groups (id) ON DELETE CASCADE
);
CREATE INDEX group_members_by_group ON group_members (group_id, machine_id);

CREATE TABLE group_tags (
    id          TEXT PRIMARY KEY,
    group_id    TEXT NOT NULL REFERENCES replication_groups (id) ON DELETE CASCADE,
    name        TEXT NOT NULL,
    consistency BIGINT NOT NULL,
    created_ns  BIGINT NOT NULL,
    deadline_ns BIGINT NOT NULL,
    state       TEXT NOT NULL,
    time_ns     BIGINT NOT NULL,
    held_us     BIGINT NOT NULL,
    error       TEXT NOT NULL
);
CREATE INDEX group_tags_by_group ON group_tags (group_id, state);
