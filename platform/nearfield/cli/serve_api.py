"""A region's Serve by HTTP: its REST interface on the dashboard, and what its ingress knows."""

from __future__ import annotations

from typing import Any

import httpx
from nearfield.core.errors import BadRequest, Unavailable

_PATH = "/api/serve/applications/"
# The first PUT waits for Serve itself to start; on a busy machine that takes a while.
_TIMEOUT_S = 180.0


class ServeApi:
    """A region's Serve: `dashboard_url` with the region's own `token`, and `ingress_url`."""

    def __init__(
        self,
        dashboard_url: str,
        ingress_url: str,
        token: str,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        # A proxy in the environment is not for 127.0.0.1: trust_env is off.
        self._client = httpx.Client(
            base_url=dashboard_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=_TIMEOUT_S,
            trust_env=False,
            transport=transport,
        )
        self._ingress = httpx.Client(
            base_url=ingress_url, timeout=5.0, trust_env=False, transport=transport
        )

    def details(self) -> dict[str, Any]:
        """All of Serve's state: `applications` by name, `proxies`, `http_options`.

        Raises:
            Unavailable: the dashboard does not answer, or not yet.
        """
        details: dict[str, Any] = self._request("GET").json()
        return details

    def put(self, config: dict[str, Any]) -> None:
        """Make this the whole desired config: what it leaves out is deleted.

        Raises:
            BadRequest: Serve refuses the config.
            Unavailable: the dashboard does not answer.
        """
        self._request("PUT", json=config)

    def routes(self) -> dict[str, str]:
        """Route prefix → application, as far as the ingress knows; {} while it does not answer."""
        try:
            response = self._ingress.get("/-/routes")
        except httpx.TransportError:
            return {}
        return dict(response.json()) if response.is_success else {}

    def shut_down(self, *, timeout_s: float) -> bool:
        """End all applications: replicas finish what they accepted. False if that took too long."""
        try:
            self._request("DELETE", timeout=timeout_s)
        except Unavailable:
            return False
        return True

    def close(self) -> None:
        self._client.close()
        self._ingress.close()

    def _request(self, method: str, **options: Any) -> httpx.Response:
        try:
            response = self._client.request(method, _PATH, **options)
        except httpx.TransportError as error:
            raise Unavailable(
                f"The region's dashboard does not answer ({type(error).__name__}). "
                "Is it running? See: nearfield status"
            ) from error
        if response.status_code == 400:
            raise BadRequest(f"Serve refuses this config: {response.text.strip()[:2000]}")
        if response.is_error:
            # A traceback, of which the end says what happened.
            said = "\n".join(response.text.strip().splitlines()[-3:])[-1000:]
            raise Unavailable(f"The region's dashboard answered {response.status_code}: {said}")
        return response
