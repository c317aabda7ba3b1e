"""Exit 0 where the server of this container is ready: asked directly, whatever proxies are set."""

import http.client
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def address(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[str, int]:
    """The server's address by the rules of `server.settings`: a flag, else the variable, else the default.

    Every interface is reached over loopback. Kubernetes sets the port to an address beside a Service that is
    named dd-server: that is no setting.
    """
    variables = {name.upper(): value for name, value in environ.items()}

    def setting(name: str, default: str) -> str:
        found = variables.get(f"DD_SERVER_{name.upper()}", default)
        for this, following in zip(arguments, [*arguments[1:], ""], strict=True):
            flag, _, value = this.partition("=")
            if flag == f"--{name}":
                found = value if "=" in this else following
        return found.strip()

    host, port = setting("host", "127.0.0.1"), setting("port", "8000")
    host = host.removeprefix("[").removesuffix("]")
    return _LOOPBACK.get(host, host), 8000 if port.startswith("tcp://") else int(port)


def main() -> None:
    process = Path("/proc/1/cmdline")  # the server, maybe behind an init of Docker's
    arguments = process.read_text(errors="replace").split("\0") if process.exists() else []
    try:
        connection = http.client.HTTPConnection(*address(arguments, os.environ), timeout=2)
        connection.request("GET", "/readyz")
        sys.exit(connection.getresponse().status != 200)
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(f"no answer: {error}")


if __name__ == "__main__":
    main()
