"""Any request at all, made from what the API says of itself: the server never fails."""

import pytest
import served as serving
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis", reason='needs the extra "dev"')
pytest.importorskip("fastapi", reason='needs the extra "serve"')

from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from xmc_jax.shipping.serve import app, service  # noqa: E402

pytestmark = pytest.mark.slow
api = schemathesis.openapi.from_dict(app.describe(service.Service(serving.CONFIG)))


@api.parametrize()
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_fails_the_server(case, served):
    """Answers have the status, type and shape that is described; good and bad requests alike.

    What is described may still be refused: an id that there is none of, say.
    """
    answer = case.call_and_validate(
        base_url=f"http://127.0.0.1:{served.port}", excluded_checks=[positive_data_acceptance]
    )
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert "\n" not in answer.json()["error"]
