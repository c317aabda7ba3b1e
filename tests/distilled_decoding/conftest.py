"""A tiny bundle's server, and both kinds of client."""

from tests.distilled_decoding.fakes import world as world
from tests.distilled_decoding.helpers import ask as ask
from tests.server.conftest import bundle_folder as bundle_folder
from tests.server.conftest import gate as gate
from tests.server.conftest import manager as manager
from tests.server.conftest import server as server
