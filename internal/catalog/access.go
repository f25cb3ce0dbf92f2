package catalog

import (
	"fmt"

	"farside/internal/dr"
)

// User is a person, or a program that acts for one.
type User struct {
	ID      string // UUID
	Name    string
	Role    string
	Created int64 // UTC ns
}

// APIToken lets its holder act for a user. Only the hash of its secret is kept.
type APIToken struct {
	ID      string
	User    string // id
	Name    string // what it is for
	Hash    []byte
	Created int64 // UTC ns
	Expires int64 // UTC ns; 0 = never
}

// JoinToken lets one node join. Only the hash of its secret is kept.
type JoinToken struct {
	ID      string
	Hash    []byte
	Role    string
	Name    string // of the node to be; "" = its host name
	Created int64  // UTC ns
	Expires int64  // UTC ns
	Used    int64  // UTC ns; 0 = not yet
	UsedBy  dr.NodeID
	UsedKey []byte // hash of the public key that it bought a certificate for
}

// AddUser adds a user. The error wraps dr.ErrExists if the name is taken.
func (t *Tx) AddUser(u User) error {
	return t.change("add user", `INSERT INTO users (id, name, role, created_ns) VALUES (?, ?, ?, ?)`, u.ID, u.Name, u.Role, u.Created)
}

func scanUser(s scanner) (u User, err error) {
	err = s.Scan(&u.ID, &u.Name, &u.Role, &u.Created)
	return u, err
}

// User returns a user.
func (t *Tx) User(id string) (User, error) {
	return one(t, "user", scanUser, `SELECT id, name, role, created_ns FROM users WHERE id = ?`, id)
}

// UserNamed returns the user with a name.
func (t *Tx) UserNamed(name string) (User, error) {
	return one(t, "user", scanUser, `SELECT id, name, role, created_ns FROM users WHERE name = ?`, name)
}

// AddAPIToken adds a token.
func (t *Tx) AddAPIToken(a APIToken) error {
	return t.change("add API token", `INSERT INTO api_tokens (id, user_id, name, hash, created_ns, expires_ns) VALUES (?, ?, ?, ?, ?, ?)`,
		a.ID, a.User, a.Name, a.Hash, a.Created, a.Expires)
}

// APIToken returns a token.
func (t *Tx) APIToken(id string) (APIToken, error) {
	return one(t, "API token", func(s scanner) (a APIToken, err error) {
		err = s.Scan(&a.ID, &a.User, &a.Name, &a.Hash, &a.Created, &a.Expires)
		return a, err
	}, `SELECT id, user_id, name, hash, created_ns, expires_ns FROM api_tokens WHERE id = ?`, id)
}

// DeleteAPITokens revokes the tokens of a user that have a name.
func (t *Tx) DeleteAPITokens(user, name string) error {
	if _, err := t.exec(`DELETE FROM api_tokens WHERE user_id = ? AND name = ?`, user, name); err != nil {
		return fmt.Errorf("delete API tokens: %w", err)
	}
	return nil
}

// AddJoinToken adds a token, unused.
func (t *Tx) AddJoinToken(j JoinToken) error {
	return t.change("add join token", `INSERT INTO join_tokens (id, hash, role, name, created_ns, expires_ns, used_ns, used_by, used_key)
		VALUES (?, ?, ?, ?, ?, ?, 0, '', x'')`, j.ID, j.Hash, j.Role, j.Name, j.Created, j.Expires)
}

// JoinToken returns a token.
func (t *Tx) JoinToken(id string) (JoinToken, error) {
	return one(t, "join token", func(s scanner) (j JoinToken, err error) {
		err = s.Scan(&j.ID, &j.Hash, &j.Role, &j.Name, &j.Created, &j.Expires, &j.Used, nodeColumn(&j.UsedBy), &j.UsedKey)
		return j, err
	}, `SELECT id, hash, role, name, created_ns, expires_ns, used_ns, used_by, used_key FROM join_tokens WHERE id = ?`, id)
}

// UseJoinToken marks a token as used; the error wraps dr.ErrNotFound if it is already.
func (t *Tx) UseJoinToken(id string, by dr.NodeID, key []byte, now int64) error {
	return t.change("use join token", `UPDATE join_tokens SET used_ns = ?, used_by = ?, used_key = ? WHERE id = ? AND used_ns = 0`,
		now, by.String(), key, id)
}

// ForgetJoinTokens deletes the tokens that expired before t0.
func (t *Tx) ForgetJoinTokens(t0 int64) error {
	if _, err := t.exec(`DELETE FROM join_tokens WHERE expires_ns < ?`, t0); err != nil {
		return fmt.Errorf("forget join tokens: %w", err)
	}
	return nil
}

// Setting returns a setting; "" if it was never set.
func (t *Tx) Setting(name string) (string, error) {
	all, err := list(t, "settings", func(s scanner) (v string, err error) {
		err = s.Scan(&v)
		return v, err
	}, `SELECT value FROM settings WHERE name = ?`, name)
	if err != nil || len(all) == 0 {
		return "", err
	}
	return all[0], nil
}

// SetSetting sets a setting.
func (t *Tx) SetSetting(name, value string) error {
	return t.change("set setting", `INSERT INTO settings (name, value) VALUES (?, ?)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
}
