"""Flags win over variables; variables that would change nothing are reported, Kubernetes' own are not."""

from __future__ import annotations

import pytest

from dd_core.errors import InvalidRequestError
from server.launcher import prepare
from server.settings import Settings, load_settings, unknown_variables

LINKS = {
    "DD_SERVER_SERVICE_HOST": "10.0.0.1",
    "DD_SERVER_SERVICE_PORT": "80",
    "DD_SERVER_SERVICE_PORT_HTTP": "80",
    "DD_SERVER_PORT": "tcp://10.0.0.1:80",
    "DD_SERVER_PORT_80_TCP": "tcp://10.0.0.1:80",
    "DD_SERVER_PORT_80_TCP_PROTO": "tcp",
    "DD_SERVER_PORT_80_TCP_PORT": "80",
    "DD_SERVER_PORT_80_TCP_ADDR": "10.0.0.1",
    "DD_SERVER_GPU_SERVICE_HOST": "10.0.0.2",
    "DD_SERVER_GPU_PORT": "tcp://10.0.0.2:80",
    "DD_SERVER_GPU_PORT_80_UDP_ADDR": "10.0.0.2",
}


def test_a_variable_that_is_no_setting_is_named_with_the_nearest() -> None:
    environ = {"DD_SERVER_MAX_BATCHES": "3", "dd_server_prot": "1", "DD_SERVER_ZZZZ": "x", "PATH": "/bin"}
    assert unknown_variables(environ) == [
        "DD_SERVER_MAX_BATCHES is no setting; did you mean DD_SERVER_MAX_BATCH?",
        "DD_SERVER_ZZZZ is no setting",
        "dd_server_prot is no setting; did you mean DD_SERVER_PORT?",
    ]


def test_settings_and_service_links_are_not_reported() -> None:
    known = {f"DD_SERVER_{name.upper()}": "1" for name in Settings.model_fields}
    assert unknown_variables(known | LINKS | {"dd_server_host": "::1"}) == []


def test_a_service_link_lookalike_is_reported() -> None:
    """Only an address makes *_PORT a link, and only a number makes PORT_*."""
    assert len(unknown_variables({"DD_SERVER_GPU_PORT": "80", "DD_SERVER_PORT_HTTP": "80"})) == 2


def test_they_are_reported_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DD_SERVER_API_KEY_FILE", "/keys")
    prepare(Settings())
    assert [record.getMessage() for record in caplog.records] == [
        "DD_SERVER_API_KEY_FILE is no setting; did you mean DD_SERVER_API_KEYS_FILE?"
    ]


@pytest.mark.parametrize("value", ["proxy.example", "10.0.0.300", "10.0.0.1/8", "127.0.0.1;::1"])
def test_a_trusted_proxy_is_an_address_or_network(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="DD_SERVER_TRUSTED_PROXIES"):
        load_settings(trusted_proxies=value)
    assert load_settings(trusted_proxies="10.0.0.0/8, ::1").trusted_proxies


def test_settings_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_SERVER_PORT", "9001")
    monkeypatch.setenv("DD_SERVER_MAX_BATCH", "7")
    settings = load_settings(port=9002, max_batch=None)
    assert (settings.port, settings.max_batch) == (9002, 7)


def test_a_kubernetes_service_link_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service named dd-server makes Kubernetes set DD_SERVER_PORT=tcp://… in every pod."""
    monkeypatch.setenv("DD_SERVER_PORT", "tcp://10.0.0.1:8000")
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70000), ("max_batch", 0), ("log_level", "loud"), ("queue_size", 3), ("drain_timeout", -1)],
)
def test_a_bad_setting_names_itself(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        load_settings(**{name: value})


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
