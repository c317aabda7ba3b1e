"""The server of a tiny bundle, and both kinds of client."""

from tests.distilled_decoding.fakes import fake as fake
from tests.distilled_decoding.helpers import call as call
from tests.server.conftest import bundle_folder as bundle_folder
from tests.server.conftest import gate as gate
from tests.server.conftest import manager as manager
from tests.server.conftest import server as server
