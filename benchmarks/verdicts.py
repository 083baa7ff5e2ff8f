"""The bars that nearfield is held to, each met, missed or not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.sides import SUITES

if TYPE_CHECKING:
    from benchmarks.report import Figures

OURS = "nearfield-haproxy"
SHARE_OF_LIMIT = {"embed": 0.9, "generate": 0.85}
TIMES_BEST_PEER = {"embed": 1.5, "generate": 2.0}
ABOVE_FORWARD_MS = 1.5
ABOVE_PREFILL_MS = 5.0
FIRST_TO_MEDIAN = 3.0
GATEWAY = "nearfield"
SHARE_OF_ENVOY = 0.8
TIMES_LITELLM = 30.0
ADDED_MS = 0.2
GROWN_MB = 8.0
FROZEN_MB = 150.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar as the table shows it."""

    bar: str
    needed: str
    found: str
    outcome: str


def of(suite: str, figures: Figures) -> list[Verdict]:
    """The suite's bars; medians over the rounds decide."""
    bars = {"embed": _embed, "generate": _generate, "edge": _edge, "replicas": _replicas}
    return bars[suite](figures) if suite in bars else []


def best_peer(
    suite: str, figures: Figures, key: str, *, least: bool = False
) -> tuple[str, float] | None:
    """Title and median of the peer with the most (or least) of a figure."""
    found = [
        (side.title, value)
        for side in SUITES[suite]
        if not side.ours and (value := figures.median(side.name, key)) is not None
    ]
    pick = min if least else max
    return pick(found, key=lambda each: each[1]) if found else None


def _embed(figures: Figures) -> list[Verdict]:
    rps = figures.median(OURS, "c32_rps")
    p99 = figures.median(OURS, "c32_p99_ms")
    alone = figures.median(OURS, "c1_p50_ms")
    limit = figures.median("limit", "rps")
    forward = figures.median("limit", "alone_p50_ms")
    peer = best_peer("embed", figures, "c32_rps")
    quickest = best_peer("embed", figures, "c32_p99_ms", least=True)
    return [
        _at_least("requests/s at 32, of the in-process limit", rps, limit, SHARE_OF_LIMIT["embed"]),
        _times_peer("requests/s at 32", rps, peer, TIMES_BEST_PEER["embed"]),
        _at_most(
            "p99 at 32, below every peer's" + (f" ({quickest[0]})" if quickest else ""),
            p99,
            quickest[1] if quickest else None,
        ),
        _at_most(
            f"p50 at 1, bare forward + {ABOVE_FORWARD_MS} ms",
            alone,
            None if forward is None else forward + ABOVE_FORWARD_MS,
        ),
    ]


def _generate(figures: Figures) -> list[Verdict]:
    tokens = figures.median(OURS, "s16_tokens_per_s")
    limit = figures.median("limit", "s16_tokens_per_s")
    prefill = figures.median("limit", "prefill_p50_ms")
    usual = figures.median(OURS, "s1_p50_ms")
    peer = best_peer("generate", figures, "s16_tokens_per_s")
    share = SHARE_OF_LIMIT["generate"]
    return [
        _at_least("tokens/s at 16, of the best in-process batched decode", tokens, limit, share),
        _times_peer("tokens/s at 16", tokens, peer, TIMES_BEST_PEER["generate"]),
        _at_most(
            f"first token at 1, bare prefill + {ABOVE_PREFILL_MS:g} ms",
            figures.median(OURS, "alone_ttft_p50_ms"),
            None if prefill is None else prefill + ABOVE_PREFILL_MS,
        ),
        _at_most(
            f"first request after the start, {FIRST_TO_MEDIAN:g} × the median one",
            figures.median(OURS, "first_ms"),
            None if usual is None else FIRST_TO_MEDIAN * usual,
        ),
    ]


def _edge(figures: Figures) -> list[Verdict]:
    rps = figures.median(GATEWAY, "c32_rps")
    alone = figures.median(GATEWAY, "c1_p50_ms")
    direct = figures.median("limit", "c1_p50_ms")
    added = None if alone is None or direct is None else alone - direct
    return [
        _at_least(
            "requests/s at 32, of Envoy's", rps, figures.median("envoy", "c32_rps"), SHARE_OF_ENVOY
        ),
        _at_least(
            "requests/s at 32, of LiteLLM's",
            rps,
            figures.median("litellm", "c32_rps"),
            TIMES_LITELLM,
        ),
        _at_most("added to p50 at 1", added, ADDED_MS),
        _at_most(
            "grown over 200,000 requests", figures.median(GATEWAY, "many_grown_mb"), GROWN_MB, "MB"
        ),
        _at_most("for 500 frozen readers", figures.median(GATEWAY, "frozen_mb"), FROZEN_MB, "MB"),
    ]


def _replicas(figures: Figures) -> list[Verdict]:
    """Against every peer, at each load."""
    loads = {"l60": "60 %", "l80": "80 %"}
    return [
        _below(
            f"p99 at {share}, below that of {side.title}",
            figures.median(GATEWAY, f"{key}_p99_ms"),
            figures.median(side.name, f"{key}_p99_ms"),
        )
        for side in SUITES["replicas"]
        if not side.ours
        for key, share in loads.items()
    ]


def _times_peer(
    bar: str, value: float | None, peer: tuple[str, float] | None, times: float
) -> Verdict:
    title = f"{bar}, of the best peer" + (f" ({peer[0]})" if peer else "")
    return _at_least(title, value, peer[1] if peer else None, times)


def _at_least(bar: str, value: float | None, base: float | None, share: float) -> Verdict:
    if value is None or not base:
        return Verdict(bar, f"≥ {share}×", "–", "not measured")
    found = f"{value / base:.2f}× ({value:,.0f} of {base:,.0f})"
    return Verdict(bar, f"≥ {share}×", found, _outcome(value >= share * base))


def _at_most(bar: str, value: float | None, most: float | None, unit: str = "ms") -> Verdict:
    if value is None or most is None:
        return Verdict(bar, "–", "–", "not measured")
    return Verdict(bar, f"≤ {most:.2f} {unit}", f"{value:.2f} {unit}", _outcome(value <= most))


def _below(bar: str, value: float | None, other: float | None) -> Verdict:
    if value is None or other is None:
        return Verdict(bar, "–", "–", "not measured")
    return Verdict(bar, f"< {other:.1f} ms", f"{value:.1f} ms", _outcome(value < other))


def _outcome(met: bool) -> str:
    return "met" if met else "**missed**"
