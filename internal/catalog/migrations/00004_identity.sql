-- +goose Up

ALTER TABLE disks ADD COLUMN identity TEXT NOT NULL DEFAULT '';

-- +goose Down

ALTER TABLE disks DROP COLUMN identity;
