"""A region as its file and its gateway tell, and how home is told to others."""

from __future__ import annotations

from dataclasses import replace

from nearfield.api.load import EndpointReport, RegionReport
from nearfield.core.federation import RegionFile
from nearfield.edge.beliefs import Peer
from nearfield.edge.distance import Place
from nearfield.edge.known import Books, Key, Known
from nearfield.edge.proxy.ports import Target
from nearfield.policy.endpoints import Endpoint, Health
from nearfield.policy.rtt import Rtt


class Region(Peer):
    """One region, as its file and its gateway tell.

    Attributes:
        target: its gateway; None for home, and where its file names none.
        rtt: to it. report, told_s: its gateway's last word, and when that came.
        wrong: why that word is not believed; None: it is.
        own_at: this gateway's requests at its endpoints when it was asked.
        endpoints: by (model, version, pool).
    """

    __slots__ = ("endpoints", "file", "is_home", "own_at", "report", "rtt", "told_s", "wrong")

    def __init__(self, file: RegionFile, target: Target | None, *, is_home: bool) -> None:
        super().__init__(file.region, target)
        self.file = file
        self.is_home = is_home
        self.rtt = Rtt()
        self.report: RegionReport | None = None
        self.told_s: float | None = None
        self.wrong: str | None = None
        self.own_at: dict[int, int] = {}
        self.endpoints: dict[Key, Known] = {}

    @property
    def place(self) -> Place:
        return Place(self.file.location.latitude, self.file.location.longitude)

    def tell(
        self, report: RegionReport, own_at: dict[int, int], books: Books, now_s: float
    ) -> None:
        """Its gateway has told what there is.

        Args:
            own_at: this gateway's requests at its endpoints when it was asked, by number.
        """
        self.report, self.told_s, self.own_at = report, now_s, own_at
        told: dict[Key, EndpointReport] = {
            (each.model, each.version, each.pool): each for each in report.endpoints
        }
        for key, each in told.items():
            endpoint = Endpoint(
                self.name,
                *key,
                self.file.jurisdiction,
                products=None if each.products is None else frozenset(each.products),
                current=each.current,
                unit_usd=each.unit_usd,
                handicap_s=each.handicap_s,
            )
            known = self.endpoints.get(key)
            if known is None:
                known = self.endpoints[key] = Known(endpoint, books.take())
                assert self.target is not None
                known.target = replace(self.target)  # its own: it can be given up alone
            known.endpoint, known.fallbacks = endpoint, each.fallbacks
            known.kind, known.free, known.scaling = each.kind, each.free, each.scaling
            known.state = replace(
                known.state,
                endpoint=endpoint,
                rtt_s=self.rtt.level_s,
                draining=each.draining or report.draining,
                replicas=each.replicas,
                slots=each.slots,
                max_queued=each.max_queued,
                load=each.load,
                own=own_at.get(known.number, 0),
                first_byte_s=each.first_byte_s,
                hold_s=each.hold_s,
                queue_age_s=each.queue_age_s,
                cold_start_s=each.cold_start_s,
                prefill_token_s=each.prefill_token_s,
            )
        for key, known in self.endpoints.items():
            if key not in told:  # no longer there: only what runs is waited for
                known.state = replace(known.state, draining=True)

    def restate(self, health: Health, weight: float, back_s: float) -> None:
        """Give every endpoint what is believed of the region."""
        for known in self.endpoints.values():
            known.state = replace(
                known.state,
                rtt_s=self.rtt.level_s,
                health=health,
                weight=weight,
                back_s=back_s,
            )

    def forget(self, books: Books) -> None:
        """Drop the endpoints that are gone and have no request of ours any more."""
        report = self.report
        told = () if report is None else [(e.model, e.version, e.pool) for e in report.endpoints]
        for key, known in list(self.endpoints.items()):
            if key not in told and not books.own[known.number]:
                del self.endpoints[key]
                books.give_back(known.number)


def told(known: Known) -> EndpointReport:
    """An endpoint, in the words other gateways are told of it."""
    state, endpoint = known.state, known.endpoint
    products = endpoint.products
    return EndpointReport(
        model=endpoint.model,
        version=endpoint.version,
        pool=endpoint.pool,
        kind=known.kind,
        free=known.free,
        current=endpoint.current,
        products=None if products is None else tuple(sorted(products)),
        fallbacks=known.fallbacks,
        unit_usd=endpoint.unit_usd,
        handicap_s=endpoint.handicap_s,
        replicas=state.replicas,
        slots=state.slots,
        max_queued=state.max_queued,
        load=max(0, state.load),
        first_byte_s=state.first_byte_s,
        hold_s=state.hold_s,
        queue_age_s=state.queue_age_s,
        cold_start_s=state.cold_start_s,
        prefill_token_s=state.prefill_token_s,
        draining=state.draining,
        scaling=known.scaling,
    )
