"""The same server as the HTTP tests use."""

from tests.server.conftest import bundle, bundle_folder, gate, manager, server

__all__ = ["bundle", "bundle_folder", "gate", "manager", "server"]
