package confserver

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"farside/internal/api"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

const (
	adminFile      = "admin.json"
	adminName      = "admin"
	adminTokenName = adminFile // of the token in that file
	settingNode    = "node_id"
)

// bootstrap makes what a configuration server needs, or finds it: CA, own
// identity, first administrator.
func (s *server) bootstrap(ctx context.Context) error {
	if err := s.openCA(ctx); err != nil {
		return err
	}
	node, err := s.ownNode(ctx)
	if err != nil {
		return err
	}
	s.identity, err = s.ca.Identity(transport.Peer{Role: transport.RoleConfigServer, Node: node}, s.hosts()...)
	if err != nil {
		return err
	}
	return s.admin(ctx)
}

// openCA loads the CA, or makes it for an empty catalog. A catalog that has nodes
// without their CA is a mistake that making a new one would hide.
func (s *server) openCA(ctx context.Context) (err error) {
	s.ca, err = transport.LoadCA(s.config.DataDir, s.now)
	if !errors.Is(err, dr.ErrNotFound) {
		return err
	}
	var id string
	if err := s.catalog.Read(ctx, func(tx *catalog.Tx) (err error) {
		id, err = tx.Setting(settingNode)
		return err
	}); err != nil {
		return err
	}
	if id != "" {
		return fmt.Errorf("the catalog is of a deployment whose CA is missing in %s: %w", s.config.DataDir, err)
	}
	if s.ca, err = transport.NewCA(s.now); err != nil {
		return err
	}
	return s.ca.Save(s.config.DataDir)
}

// ownNode returns the server's own node id, which stays.
func (s *server) ownNode(ctx context.Context) (id dr.NodeID, err error) {
	err = s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		text, err := tx.Setting(settingNode)
		if err != nil {
			return err
		}
		if text == "" {
			id = dr.NewNodeID()
			return tx.SetSetting(settingNode, id.String())
		}
		id, err = dr.ParseNodeID(text)
		return err
	})
	return id, err
}

// admin sees to it that there is an administrator, and a context file with a
// token of theirs and the server's current addresses. If the file is lost, a new token
// takes the place of the old one.
func (s *server) admin(ctx context.Context) error {
	name := filepath.Join(s.config.DataDir, adminFile)
	c, err := api.LoadContext(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if c.Token, err = s.newAdminToken(ctx); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	c.Servers, c.CA = s.advertise, ""
	for _, der := range s.ca.Authorities() {
		c.CA += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	text, err := c.Marshal()
	if err != nil {
		return err
	}
	return transport.WriteFile(name, text)
}

func (s *server) newAdminToken(ctx context.Context) (text string, err error) {
	err = s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		now := s.now().UnixNano()
		u, err := tx.UserNamed(adminName)
		if errors.Is(err, dr.ErrNotFound) {
			u = catalog.User{ID: newUUID(), Name: adminName, Role: roleAdministrator, Created: now}
			err = tx.AddUser(u)
		}
		if err != nil {
			return err
		}
		if err := tx.DeleteAPITokens(u.ID, adminTokenName); err != nil {
			return err
		}
		var t catalog.APIToken
		t.ID, text, t.Hash = newAPIToken()
		t.User, t.Name, t.Created = u.ID, adminTokenName, now
		return tx.AddAPIToken(t)
	})
	return text, err
}
