"""Three replicas, a proxy and Prometheus on this machine, in the foreground, until Ctrl-C: `make fleet`.

With the configurations that deploy/ ships, but for the ports.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks import report
from benchmarks.client import HOST
from benchmarks.replicas import PROXIES, fleet, program, proxying
from dd_core.bundle import DEFAULT_BUNDLE

PROMETHEUS = report.ROOT / "deploy" / "prometheus"


def prometheus_configuration(replicas: Sequence[int]) -> str:
    """The shipped scrape configuration with these replicas in place of its one, and without pods."""
    text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
    text, _, _ = text.partition("\n  - job_name: dd-server-pods")
    named = '["127.0.0.1:8000"]'
    assert named in text and "  - alerts.yml" in text
    targets = ", ".join(f'"{HOST}:{port}"' for port in replicas)
    return text.replace(named, f"[{targets}]").replace("- alerts.yml", f"- {PROMETHEUS / 'alerts.yml'}")


@contextmanager
def scraping(replicas: Sequence[int], port: int) -> Iterator[str]:
    """Prometheus with the shipped alerts; the address of its page.

    Raises:
        BenchmarkError: it is not installed, or ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), f"{HOST}:{port}"
        (folder / "prometheus.yml").write_text(prometheus_configuration(replicas), encoding="utf-8")
        options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with program(
            "prometheus", [*options, f"--web.listen-address={address}"], folder, f"http://{address}/-/ready"
        ):
            yield f"http://{address}"


def run(chosen: argparse.Namespace) -> bool:
    """Start all, print the addresses, wait for Ctrl-C or SIGTERM, and end all.

    Raises:
        BenchmarkError: a part does not start.
    """
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        print(f"Starting {chosen.replicas} replicas of {chosen.bundle} …", flush=True)
        ports = [replica.port for replica in stack.enter_context(fleet(chosen.bundle, chosen.replicas))]
        url = stack.enter_context(proxying(chosen.proxy, ports, chosen.port))
        page = stack.enter_context(scraping(ports, chosen.prometheus_port))
        print(f"images      {url}")
        for number, port in enumerate(ports):
            print(f"replica {number}   http://{HOST}:{port}")
        print(f"Prometheus  {page}")
        print(f"alerts      {page}/alerts")
        print("Ctrl-C ends all.", flush=True)
        signal.pause()
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.local_fleet", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE, help="built-in model, or a bundle's folder")
    parser.add_argument("--replicas", type=report.positive, default=3)
    parser.add_argument("--proxy", choices=PROXIES, default=PROXIES[0])
    parser.add_argument("--port", type=report.positive, default=8080, help="of the proxy")
    parser.add_argument("--prometheus-port", type=report.positive, default=9090)
    # A shell that starts it in the background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return report.run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
