"""Requests drawn from the server's own description of itself, and what every reply must keep to.

    GET /openapi.json → cases: valid, invalid, servable, and schemathesis' boundary cases → checks

The checks are schemathesis' own (status, media type, headers and body as documented; bad data refused;
other methods refused), and one of ours: no 5xx but those that the contract makes of a deadline. It
is left out that valid data must be accepted: only the model knows which classes there are, and `servable`
cases, which know them too, must be.
"""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import CHECKS, load_all_checks

from distilled_decoding.contract import MAX_SEED, MAX_SEED_AS_NUMBER
from tests.server.helpers import Running, eventually

# How many of a hundred cases; the rest are servable.
VALID, INVALID = 30, 45
ACCEPTS = [
    *([None] * 4), "application/json", "*/*", "text/event-stream", "image/*",
    "image/png", "image/webp, application/json;q=0.5",
    "image/jpeg;q=2", "text/html", "image/png;q=x, ;;,", ",", "a" * 2000,
]  # fmt: skip
_DEADLINE = {(503, "deadline_unreachable"), (504, "deadline_exceeded")}
_NOT_OURS = {"positive_data_acceptance", "not_a_server_error"}  # the second one knows no documented 503
_TOO_LARGE = ["413", "431"]  # bad data may be refused for its length, before it is read
_SETTINGS = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)

# Of a valid request these may be anything; the others depend on the model or exclude one another.
_FREE = {"format", "priority", "deadline_ms", "brownout", "latency_budget_ms"}

Seen = Counter[tuple[str, int]]


class Fuzzer:
    """Sends cases to one server and counts replies by the kind of case and status.

    Args:
        url: of a server that is ready.
    """

    def __init__(self, url: str) -> None:
        load_all_checks()
        self._checks = [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in _NOT_OURS]
        self.schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        refusals = self.schema.config.checks.negative_data_rejection
        refusals.expected_statuses = [*refusals.expected_statuses, *_TOO_LARGE]
        self._session = requests.Session()
        self._session.trust_env = False
        [self._model] = self._session.get(f"{url}/models", timeout=60).json()["models"]
        self.seen: Seen = Counter()

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def try_case(self, kind: str, case: Case, accept: str | None = None) -> Response:
        """Send one case; raises what the checks raise."""
        headers = {} if accept is None else {"Accept": accept}
        response = case.call(session=self._session, headers=headers, timeout=60)
        self.seen[kind, response.status_code] += 1
        case.validate_response(response, checks=self._checks, headers=headers)
        if response.status_code >= 500:
            code = response.json()["error"]["code"]
            assert (response.status_code, code) in _DEADLINE and "deadline_ms" in case.body, case.body
        return response

    def boundary_cases(self) -> None:
        """Every operation with every other method, and each field at and beyond its limits."""
        for found in self.schema.get_all_operations():
            operation = found.ok()
            config = self.schema.config.generation_for(operation=operation, phase="coverage")
            for case in self.schema.iter_coverage_cases(
                operation, generation_modes=list(GenerationMode), generation_config=config
            ):
                self.try_case("boundary", case)

    def drawn_cases(self, count: int, number: int) -> None:
        """So many requests to `POST /generate`: those of series `number`.

        The same in every run of the same code: hypothesis also draws the constants that it finds there.
        """
        operation = self.schema["/generate"]["POST"]
        kinds = {
            "valid": operation.as_strategy(GenerationMode.POSITIVE),
            "invalid": operation.as_strategy(GenerationMode.NEGATIVE),
            "servable": self._servable(operation.as_strategy(GenerationMode.POSITIVE)),
        }
        shares = {"valid": count * VALID // 100, "invalid": count * INVALID // 100}
        shares["servable"] = count - sum(shares.values())
        for kind, strategy in kinds.items():
            self._draw(kind, strategy, shares[kind], number)

    def _draw(self, kind: str, strategy: st.SearchStrategy[Case], count: int, number: int) -> None:
        @seed(number)
        @settings(_SETTINGS, max_examples=count)
        @given(case=strategy, accept=st.sampled_from(ACCEPTS))
        def send(case: Case, accept: str | None) -> None:
            response = self.try_case(kind, case, accept)
            if kind == "servable" and "deadline_ms" not in case.body:
                assert response.status_code in (200, 406), response.text[:500]
                assert accept is not None or response.status_code == 200, response.text[:500]

        send()

    def _servable(self, valid: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
        """Valid cases whose class, budget and number of images this model has, with integers as such:
        to JSON Schema 2.0 is an integer, to the contract it is none.
        """
        classes = self._model["classes"]
        budgets = [run["from"] for run in self._model["budgets"]]
        fields = {
            "label": st.integers(0, len(classes) - 1) | st.sampled_from(classes),
            # Mostly cheap ones: a case of 64 passes takes as long as dozens of others.
            "steps": st.sampled_from(budgets[:2] * 8 + budgets),
            "n": st.integers(1, 3),
            "seed": st.none() | st.integers(0, MAX_SEED_AS_NUMBER) | st.integers(0, MAX_SEED).map(str),
        }

        @st.composite
        def draw_servable(draw: st.DrawFn) -> Case:
            case = draw(valid.filter(lambda case: isinstance(case.body, dict)))
            kept = {name: value for name, value in case.body.items() if name in _FREE}
            case.body = kept | {name: draw(strategy) for name, strategy in fields.items()}
            return case

        return draw_servable()


def fuzz(
    live: Running, count: int, caplog: pytest.LogCaptureFixture, number: int = 0, *, boundary: bool = True
) -> Seen:
    """`count` drawn cases of series `number`, after all `boundary` cases, which are the same in every series;
    returns how often each kind of case got each status.
    """
    fuzzer = Fuzzer(live.url)
    try:
        if boundary:
            fuzzer.boundary_cases()
        fuzzer.drawn_cases(count, number)
    finally:
        fuzzer.close()
    kinds = {"valid": {200, 400}, "invalid": {400}, "servable": {200, 406}}
    if boundary:
        kinds["boundary"] = {200, 400, 405, 415}
    for kind, statuses in kinds.items():
        assert statuses <= {status for name, status in fuzzer.seen if name == kind}, fuzzer.seen
    # Whatever was refused, nothing went wrong inside.
    # (An exporter of traces that another test began may still be giving up.)
    ours = [r for r in caplog.records if not r.name.startswith("opentelemetry")]
    assert [record for record in ours if record.levelno >= logging.WARNING] == []
    eventually(lambda: live.metric("dd_inflight_requests") == 0, "nothing is left over")
    assert live.post({"label": 0}).status_code == 200
    return fuzzer.seen
