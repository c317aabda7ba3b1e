"""Exit 0 where the server of this container is ready: asked directly, whatever proxies are set."""

import http.client
import os
import sys

# As `server.settings` reads them: every interface is reached over loopback, and a Service named dd-server
# makes Kubernetes set the port to an address.
host = os.environ.get("DD_SERVER_HOST") or "127.0.0.1"
port = os.environ.get("DD_SERVER_PORT") or "8000"
connection = http.client.HTTPConnection(
    {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host),
    8000 if port.startswith("tcp://") else int(port),
    timeout=2,
)
try:
    connection.request("GET", "/readyz")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"no answer: {error}")
