-- Points on a schedule, and what became of those that were asked for.

-- +goose Up
ALTER TABLE machines ADD COLUMN filesystem_points_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE machines ADD COLUMN application_points_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE machines ADD COLUMN freeze_limit_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE tags ADD COLUMN detail TEXT NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE tags DROP COLUMN detail;
ALTER TABLE machines DROP COLUMN freeze_limit_ms;
ALTER TABLE machines DROP COLUMN application_points_ms;
ALTER TABLE machines DROP COLUMN filesystem_points_ms;
