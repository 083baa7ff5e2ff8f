"""The roofline by hand on round numbers, and its error on what others have published."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
from nearfield.core.catalog_files import read_catalog
from nearfield.policy.roofline import Chip, Efficiency, Setup, highest_load, load_of
from nearfield.policy.validate import (
    Off,
    architectures,
    chip_of,
    efficiency_of,
    predict,
    setup_of,
    summary,
    validate,
)

CATALOG = read_catalog()
MODELS = architectures(CATALOG.models)
LLAMA = MODELS["llama-3.1-8b"]
IDEAL = Efficiency(
    compute_16=1.0,
    compute_8=1.0,
    bandwidth=1.0,
    layer_s=0.0,
    prompt_layer_s=0.0,
    activations=0.0,
    reduce_s=0.0,
    link=1.0,
)
# 100 GB, 1 TB/s, 100 TFLOPS, 100 GB/s between eight.
CHIP = Chip("c", 100e9, 1e12, {"bf16": 100e12, "fp8": 200e12}, 100e9, 8, IDEAL)


def setup(chips: int = 1, precision: str = "bf16", chip: Chip = CHIP) -> Setup:
    return Setup(LLAMA, chip, precision, chips)


class TestByHand:
    def test_a_token_alone_reads_the_weights_once(self) -> None:
        """All but the input embedding: 7.5e9 parameters of two bytes, at 1 TB/s."""
        weights_s = (LLAMA.parameters - LLAMA.lookup) * 2 / 1e12
        cache_s = 131072 * 1000 / 1e12
        assert setup().step_s(1, 1000) == pytest.approx(weights_s + cache_s)

    def test_a_prompt_computes(self) -> None:
        n = 2048
        products = 2 * (LLAMA.active - LLAMA.head) * n + 2 * LLAMA.head  # the head: one position
        attention = 4 * LLAMA.layers * LLAMA.hidden * n * n / 2
        expected = (products + attention) / 100e12
        assert setup().prefill_s(n) == pytest.approx(expected)

    def test_a_short_prompt_is_bound_by_reading(self) -> None:
        assert setup().prefill_s(1) == pytest.approx(setup().step_s(1, 1), rel=1e-3)

    def test_eight_bits_halve_what_is_read_but_embedding_and_head(self) -> None:
        kept = 2 * (LLAMA.lookup + LLAMA.head)
        rest = LLAMA.parameters - LLAMA.lookup - LLAMA.head
        assert setup(precision="fp8").weight_bytes == pytest.approx(kept + rest)
        assert setup().weight_bytes == pytest.approx(LLAMA.parameters * 2)

    def test_chips_share_weights_and_reduce(self) -> None:
        ideal = dataclasses.replace(CHIP, link_bytes_s=math.inf)
        alone, four = setup(chip=ideal).step_s(1, 0), setup(4, chip=ideal).step_s(1, 0)
        assert four == pytest.approx(alone / 4)
        wire_s = 2 * LLAMA.layers * 2 * 3 / 4 * LLAMA.hidden * 2 / 100e9
        assert setup(4).step_s(1, 0) == pytest.approx(four + wire_s)

    def test_in_a_mesh_two_chips_have_one_wire_of_seven(self) -> None:
        mesh = dataclasses.replace(CHIP, mesh=True)
        assert mesh.link(8) == pytest.approx(100e9)
        assert mesh.link(2) == pytest.approx(100e9 / 7)

    def test_the_cache_is_split_no_further_than_its_heads(self) -> None:
        assert setup(8).cache_bytes(1) == pytest.approx(131072 / 8)
        assert setup(16).cache_bytes(1) == pytest.approx(131072 / 8)
        latent = Setup(MODELS["deepseek-v3"], CHIP, "fp8", 8)
        assert latent.cache_bytes(1) == 61 * 576 * 2, "each chip keeps it whole"

    def test_what_fits(self) -> None:
        room = 100e9 * 0.9 * 0.97 - LLAMA.parameters * 2
        assert setup().room_bytes == pytest.approx(room)
        assert setup().sequences(1000) == int(room / 131072 / 1000)
        assert Setup(MODELS["llama-3.1-70b"], CHIP, "bf16").sequences(1) == 0

    def test_no_rate_no_prompt_time(self) -> None:
        unknown = dataclasses.replace(CHIP, rates={})
        with pytest.raises(ValueError, match="no bf16 compute rate of c is published"):
            setup(chip=unknown).prefill_s(10)
        assert setup(chip=unknown).step_s(1, 10) > 0


class TestLoad:
    def test_a_round_is_prompts_and_steps(self) -> None:
        one = setup()
        prefill_s, step_s = one.round_s(10, 1000, 200)
        load = load_of(one, 10, 1000, 200)
        assert load.rps * (10 * prefill_s + 200 * step_s) == pytest.approx(10)
        assert load.tpot_s == pytest.approx(step_s + 9 * prefill_s / 200)
        # Little's law: those running are those that came in the time one stays.
        stay_s = prefill_s + 200 * load.tpot_s
        assert load.rps * stay_s == pytest.approx(10, rel=0.01)

    def test_the_highest_load_is_the_last_that_keeps_the_slo(self) -> None:
        one = setup()
        for ttft_s, tpot_s in ((0.5, math.inf), (math.inf, 0.05), (0.4, 0.03)):
            found = highest_load(one, 1000, 200, ttft_slo_s=ttft_s, tpot_slo_s=tpot_s)
            assert found is not None
            assert found.ttft_s <= ttft_s
            assert found.tpot_s <= tpot_s
            more = load_of(one, found.running + 1, 1000, 200)
            assert more.ttft_s > ttft_s or more.tpot_s > tpot_s

    def test_none_if_one_request_is_too_slow(self) -> None:
        assert highest_load(setup(), 1000, 200, ttft_slo_s=0.01) is None

    def test_memory_bounds_it(self) -> None:
        small = dataclasses.replace(CHIP, memory_bytes=20e9)
        found = highest_load(setup(chip=small), 1000, 200)
        assert found is not None
        assert found.running == setup(chip=small).sequences(1200)

    def test_embeddings_are_batches(self) -> None:
        found = highest_load(Setup(MODELS["minilm"], CHIP, "bf16"), 128, 0, ttft_slo_s=0.01)
        assert found is not None
        assert found.ttft_s <= 0.01
        assert found.tpot_s == 0


class TestAgainstPublished:
    OFF = validate(CATALOG.figures, CATALOG.accelerators, MODELS, CATALOG.shares)

    def of(self, use: str, family: str | None = None, task: str = "generate") -> list[Off]:
        return [
            off
            for off in self.OFF
            if off.figure.use == use
            and MODELS[off.figure.model].task == task
            and family in (None, CATALOG.accelerators[off.figure.accelerator].family)
        ]

    @pytest.mark.parametrize(
        ("row", "families", "task"),
        [
            ("NVIDIA", ["nvidia"], "generate"),
            ("AMD MI300X", ["amd"], "generate"),
            ("Gaudi 3", ["gaudi"], "generate"),
            ("TPU", ["tpu"], "generate"),
            ("Trainium, Inferentia", ["neuron"], "generate"),
            ("Apple", ["apple"], "generate"),
            ("CPU, IPU, wafer", ["cpu", "ipu", "wafer"], "generate"),
            ("all language models", [None], "generate"),
            ("encoders: NVIDIA", ["nvidia"], "embed"),
            ("encoders: Inferentia", ["neuron"], "embed"),
        ],
    )
    def test_the_error_is_what_the_documents_say(
        self, row: str, families: list[str | None], task: str
    ) -> None:
        """The table of docs/plan.md: a change of the model must change it too."""
        text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
        said = [cell.strip(" %") for cell in line.strip("|").split("|")][1:]
        told = []
        for use in ("fit", "check"):
            found = summary(off for family in families for off in self.of(use, family, task))
            empty = [str(found.count), "", ""]
            shown = [str(found.count), f"{found.median:.0%}"[:-1], f"{found.worst:.0%}"[:-1]]
            told += shown if found.count else empty
        assert told == said

    def test_most_that_it_has_not_seen_is_near(self) -> None:
        """What the margin of a plan rests on."""
        errors = sorted(off.error for off in self.of("check"))
        assert errors[int(len(errors) * 0.75)] <= 0.205
        assert errors[int(len(errors) * 0.90)] <= 0.335

    def test_a_rate_taken_from_one_time_tells_the_others(self) -> None:
        """T4: one time of sixteen was looked at."""
        others = [off for off in self.of("check", None, "embed") if off.figure.accelerator == "T4"]
        assert len(others) == 15
        assert summary(others).median < 0.06
        for off in self.of("rate", None, "embed"):
            assert off.error < 0.01
            assert "published/encoders.yaml" in CATALOG.accelerators[off.figure.accelerator].note

    def test_errors_count_alike_both_ways(self) -> None:
        figure = CATALOG.figures[0]
        assert Off(figure, figure.value * 2).error == pytest.approx(1)
        assert Off(figure, figure.value / 2).error == pytest.approx(1)

    def test_every_figure_is_cited_and_none_is_used_twice(self) -> None:
        assert {figure.source for figure in CATALOG.figures} == set(CATALOG.sources)
        used: dict[str, set[tuple[str, str, str, int]]] = {"fit": set(), "check": set()}
        for each in CATALOG.figures:
            if each.use == "rate":
                continue
            used[each.use].add((each.source, each.model, each.accelerator, each.chips))
        assert not used["fit"] & used["check"]

    def test_each_metric_is_predicted_in_its_unit(self) -> None:
        for metric, least, most in (
            ("ttft_ms", 1, 5000),
            ("tpot_ms", 1, 200),
            ("latency_s", 5, 300),
            ("tokens_s", 50, 100_000),
        ):
            figure = next(each for each in CATALOG.figures if each.metric == metric)
            row = CATALOG.accelerators[figure.accelerator]
            chip = chip_of(row, efficiency_of(row.family, CATALOG.shares))
            assert least < predict(figure, setup_of(figure, MODELS[figure.model], chip)) < most

    def test_families_without_figures_are_assumed_and_say_so(self) -> None:
        assert efficiency_of("cpu", CATALOG.shares).source == "assumed"
        assert efficiency_of("nvidia", CATALOG.shares).source == "fitted"


def fit_script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "fit_roofline.py"
    spec = importlib.util.spec_from_file_location("fit_roofline", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_shipped_is_what_the_script_finds() -> None:
    script = fit_script()
    for family, shipped in CATALOG.shares.items():
        assert script.fitted(CATALOG, family) == shipped, "run scripts/fit_roofline.py --write"
