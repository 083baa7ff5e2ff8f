"""A routing decision in words and numbers: for every endpoint, why it was chosen or not.

Made only for those who ask (a header, a sampled trace, `nearfield route --explain`), from the plan
and the queues that the decision was made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nearfield.policy.endpoints import CRITICALITIES, DEFAULT, EndpointState, Refusal
from nearfield.policy.route import Candidate, Pick, Plan, Row


@dataclass(frozen=True, slots=True)
class Line:
    """One endpoint's part in a decision. Seconds; None where they do not apply.

    Attributes:
        verdict: `chosen`, `eligible` or the name of the filter that refused it.
        predicted_s: round trip + wait + first byte + cold start.
    """

    endpoint: str
    verdict: str
    reason: str
    rtt_s: float
    wait_s: float | None = None
    first_byte_s: float | None = None
    cold_start_s: float | None = None
    handicap_s: float | None = None
    predicted_s: float | None = None
    unit_usd: float | None = None
    load: int | None = None
    slots: int | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision: its outcome in one sentence, and every endpoint's line, the best first."""

    outcome: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        """A table as wide as its content."""
        head = ("", "endpoint", "verdict", *_COLUMNS, "reason")
        table = [head, *(_cells(line) for line in self.lines)]
        widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
        numbers = range(3, 3 + len(_COLUMNS))
        rows = [
            "  ".join(
                cell.rjust(width) if i in numbers else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=False))
            )
            + "  "
            + row[-1]
            for row in table
        ]
        return "\n".join([self.outcome, *(row.rstrip() for row in rows)])


_COLUMNS = ("rtt", "wait", "first byte", "cold", "predicted", "load", "USD")


def _cells(line: Line) -> tuple[str, ...]:
    return (
        "→" if line.verdict == "chosen" else "",
        line.endpoint,
        line.verdict,
        _ms(line.rtt_s),
        _ms(line.wait_s),
        _ms(line.first_byte_s),
        _ms(line.cold_start_s or None),
        _ms(line.predicted_s),
        "" if line.load is None else f"{line.load}/{line.slots}",
        "" if not line.unit_usd else f"{line.unit_usd:g}",
        line.reason,
    )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f} ms"


def summary(pick: Pick) -> str:
    """A decision in one line of ASCII, for a header or a span.

    `nearest; 41.0 ms = 12.0 way + 0.0 wait + 29.0 first byte`
    """
    state = pick.candidate.state
    parts = [(state.rtt_s, "way"), (pick.wait_s, "wait"), (state.first_byte_s, "first byte")]
    text = f"{pick.why}; {pick.predicted_s * 1000:.1f} ms = "
    text += " + ".join(f"{seconds * 1000:.1f} {name}" for seconds, name in parts)
    if state.replicas == 0:
        text += f" + {(state.cold_start_s or 0.0) * 1000:.1f} cold start"
    if pick.saved_s:
        text += f" - {pick.saved_s * 1000:.1f} cached"
    return text


def explain(
    plan: Plan,
    decision: Pick | Refusal,
    own: Sequence[int],
    *,
    criticality: int = DEFAULT,
) -> Explanation:
    """Why this decision, for every endpoint of the plan.

    Args:
        decision: what `route.pick` answered for this plan.
        own: the requests in flight it was given.
    """
    chosen = decision.candidate if isinstance(decision, Pick) else None
    shown = decision.plan if isinstance(decision, Pick) else plan
    lines = [
        _eligible(shown, row, position, own, criticality, decision)
        for position, row in enumerate(shown.rows)
    ]
    lines.sort(key=lambda line: (line.verdict != "chosen", line.predicted_s or 0.0))
    for refused in shown.refused:
        line = _line(refused.state, refused.filter, refused.reason)
        lines.append(line)
    if chosen is None:
        assert isinstance(decision, Refusal)
        after_s = decision.retry_after_s
        when = "" if after_s is None else f" Again in {after_s:.1f} s."
        return Explanation(f"Refused ({decision.filter}): {decision.message}{when}", tuple(lines))
    instead = "" if shown is plan else f" instead of {plan.ask.model}"
    assert isinstance(decision, Pick)
    outcome = f"{chosen.state.endpoint.name}{instead}: {summary(decision)}"
    return Explanation(outcome, tuple(lines))


def _line(state: EndpointState, verdict: str, reason: str) -> Line:
    return Line(state.endpoint.name, verdict, reason, state.rtt_s)


def _eligible(
    plan: Plan,
    row: Row,
    position: int,
    own: Sequence[int],
    criticality: int,
    decision: Pick | Refusal,
) -> Line:
    candidate, state = row.candidate, row.candidate.state
    mine = own[row.number]
    wait_s = row.wait_s(mine)
    verdict, reason = "eligible", ""
    if isinstance(decision, Pick) and decision.candidate is candidate:
        verdict, reason = "chosen", str(decision.why)
        wait_s = decision.wait_s
    elif mine >= row.rooms[criticality]:
        verdict, reason = "full", f"no room for {CRITICALITIES[criticality]} requests"
    else:
        reason = _not_chosen(plan, row, position, wait_s, decision)
    return Line(
        state.endpoint.name,
        verdict,
        reason,
        state.rtt_s,
        wait_s=wait_s,
        first_byte_s=state.first_byte_s,
        cold_start_s=(state.cold_start_s or 0.0) if state.replicas == 0 else 0.0,
        handicap_s=state.endpoint.handicap_s,
        predicted_s=candidate.idle_s + wait_s,
        unit_usd=state.endpoint.unit_usd,
        load=state.load - state.own + mine,
        slots=state.slots,
        weight=state.weight,
    )


def _not_chosen(
    plan: Plan, row: Row, position: int, wait_s: float, decision: Pick | Refusal
) -> str:
    if isinstance(decision, Refusal):
        return decision.filter
    best: Candidate = decision.candidate
    reasons = []
    if row.weight < 1.0:
        reasons.append(f"re-entering, {row.weight:.0%} of its share")
    price, best_price = row.candidate.state.endpoint.unit_usd, best.state.endpoint.unit_usd
    if plan.caller.mode == "economy" and price > best_price:
        reasons.append(f"costs {price:g} USD, not {best_price:g}")
    elif row.candidate.idle_s > plan.within_s:
        reasons.append(f"does not meet the SLO within {plan.within_s:g} s")
    behind_s = row.floor_s + wait_s - (best.floor_s + decision.wait_s - decision.saved_s)
    if position < plan.near and decision.why in ("near-equal", "session"):
        reasons.append("near-equal, not drawn or fuller")
    elif behind_s > 0:
        reasons.append(f"{behind_s * 1000:.1f} ms slower")
        if row.candidate.idle_s + wait_s < decision.predicted_s:
            reasons[-1] += " where first bytes are alike"
    handicap_s = row.candidate.state.endpoint.handicap_s
    if handicap_s:
        reasons.append(f"handicap {handicap_s * 1000:.0f} ms")
    return ", ".join(reasons) or "as good"
