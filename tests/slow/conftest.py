"""The servers and pictures of other folders, for what takes long."""

from __future__ import annotations

from tests.server.conftest import bundle as bundle
from tests.server.conftest import bundle_folder as bundle_folder
from tests.server.conftest import server as server
from tests.training.conftest import cache as cache
