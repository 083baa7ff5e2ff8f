"""The catalogue that ships: every row valid, with a source, dense and plausible."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml
from nearfield.core.architecture import UnknownArchitecture, architecture_of
from nearfield.core.catalog import Accelerator, PriceFile
from nearfield.core.catalog_files import FOLDERS, packaged, read_catalog
from nearfield.core.check import check, kind_of
from nearfield.core.errors import BadRequest
from nearfield.core.yaml_document import Document, parse
from nearfield.core.yaml_file import read_document
from nearfield.policy.validate import architectures
from pydantic import ValidationError

CATALOG = read_catalog()
ROWS = list(CATALOG.accelerators.values())
REPOSITORY = Path(__file__).parents[2]
NOTED = [
    parent / "shared" / "data" / "hardware" / "accelerators.csv"
    for parent in (REPOSITORY, REPOSITORY.parent)
]


def document(path: Path) -> tuple[str, Document]:
    read = read_document(path, path.name)
    assert isinstance(read, Document), read
    return path.name, read


@pytest.mark.parametrize("kind", FOLDERS)
def test_nearfield_check_takes_every_file(kind: str) -> None:
    for path in sorted((packaged() / kind).glob("*.yaml")):
        name, read = document(path)
        assert check([(name, read)]) == [], path
        assert kind_of(read) == kind


def test_it_knows_every_sort_of_hardware() -> None:
    families = {row.family for row in ROWS}
    assert families == {
        "nvidia", "amd", "tpu", "neuron", "gaudi", "ipu", "wafer", "cpu", "apple"
    }  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
class TestEveryRow:
    def test_has_sources_and_says_how_far_to_trust_it(self, row: Accelerator) -> None:
        assert row.sources
        assert all(re.match(r"https?://\S+$", source) for source in row.sources)
        if row.evidence == "derived":
            assert row.note, "a derived figure says from what"

    def test_has_no_figure_with_sparsity(self, row: Accelerator) -> None:
        """A rate with sparsity is twice the dense one: seen against its own 16-bit rate, against
        what its memory can feed, and against what vendors print."""
        sixteen = row.dense.get("bf16") or row.dense.get("fp16")
        printed = {242, 485, 733.0 * 2, 1466, 1248, 2496, 3958, 9000, 5229, 2563, 125000}
        assert not printed.intersection(row.dense.values())
        for eight in ("fp8", "int8"):
            if sixteen and eight in row.dense:
                ratio = row.dense[eight] / sixteen
                assert min(abs(ratio - 1), abs(ratio - 2)) < 0.06
        if sixteen and row.measured_bf16_tflops:
            cool = row.power_w is not None and row.power_w < 100  # do not hold their rate
            assert (0.4 if cool else 0.5) < row.measured_bf16_tflops / sixteen <= 1
        if sixteen and row.family not in ("ipu", "cpu"):  # HBM or GDDR: operations a byte
            assert 80 < sixteen * 1000 / row.bandwidth_gb_s < 600

    def test_is_no_better_than_physics(self, row: Accelerator) -> None:
        if row.memory != "SRAM":
            assert (30 if row.family == "cpu" else 100) < row.bandwidth_gb_s < 10_000
        if row.interconnect is not None:
            assert row.interconnect.gb_s < row.bandwidth_gb_s


def test_what_was_noted_down_stands_in_it() -> None:
    """Against the table it was made from, where that lies beside the repository."""
    table = next((path for path in NOTED if path.exists()), None)
    if table is None:
        pytest.skip("no shared/data/hardware here")
    with table.open(encoding="utf-8") as file:
        for noted in csv.DictReader(file):
            name = noted["accelerator"].replace(" ", "-").replace("-(CS-3)", "")
            name = {"GC200-IPU": "GC200"}.get(name, name)
            row = CATALOG.accelerators[name]
            assert row.memory_gb == float(noted["memory_gb"]), name
            assert row.bandwidth_gb_s == float(noted["bandwidth_gbps"]), name
            for column, key in (("bf16_tflops_dense", "bf16"), ("fp8_tflops_dense", "fp8")):
                if noted[column]:
                    assert row.dense[key] == float(noted[column]), name  # type: ignore[index]
            if noted["power_w"]:
                assert row.power_w == float(noted["power_w"]), name
            if noted["measured_bf16_tflops"]:
                assert row.measured_bf16_tflops == float(noted["measured_bf16_tflops"]), name


def test_a_sparse_figure_is_refused() -> None:
    row = CATALOG.accelerators["L4"].model_dump()
    row["dense"] = {**row["dense"], "fp8": 485.0}
    with pytest.raises(ValidationError, match="figure with sparsity"):
        Accelerator.model_validate(row)


@pytest.mark.parametrize("name", CATALOG.prices)
class TestPrices:
    def test_are_sane(self, name: str) -> None:
        file = CATALOG.prices[name]
        assert file.source.date
        assert file.source.licence
        for region, offers in file.offers.items():
            for machine, offer in offers.items():
                where = f"{region} {machine}"
                each = file.machines[machine].count
                for usd in (offer.on_demand_usd_h, offer.spot_usd_h):
                    assert usd is None or 0.01 < usd / each < 30, where
                if offer.on_demand_usd_h and offer.spot_usd_h:
                    assert offer.spot_usd_h <= offer.on_demand_usd_h, where

    def test_say_where_or_are_for_anywhere(self, name: str) -> None:
        file = CATALOG.prices[name]
        if name == "small-clouds":
            assert not file.places
        else:
            assert set(file.places) == set(file.offers)


def test_a_machine_nobody_describes_is_refused() -> None:
    raw = yaml.safe_load((packaged() / "prices" / "aws.yaml").read_text())
    raw["offers"]["us-east-1"]["p9.xlarge"] = {"on_demand_usd_h": 1.0}
    with pytest.raises(ValidationError, match=r"p9\.xlarge, which is not in machines"):
        PriceFile.model_validate(raw)


class TestOnesOwn:
    def test_hardware_and_prices_join(self, tmp_path: Path) -> None:
        (tmp_path / "hardware").mkdir()
        row = CATALOG.accelerators["L4"].model_dump(exclude_none=True)
        row.update(name="Ours", sources=["https://example.com/ours"])
        text = yaml.safe_dump({"hardware": "ours", "accelerators": [row]})
        (tmp_path / "hardware" / "ours.yaml").write_text(text)
        found = read_catalog([tmp_path])
        assert found.accelerators["Ours"].memory_gb == 24
        assert "L4" in found.accelerators

    def test_what_is_wrong_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BadRequest, match="has none of the folders hardware"):
            read_catalog([tmp_path])
        (tmp_path / "hardware").mkdir()
        (tmp_path / "hardware" / "x.yaml").write_text("hardware: x\naccelerators: [{name: a}]\n")
        with pytest.raises(BadRequest, match=r"x\.yaml: accelerators\.0\.title.*nearfield check"):
            read_catalog([tmp_path])

    @pytest.mark.parametrize(
        ("key", "value", "remedy"),
        [
            ("model", "llama-3.1-9b", "did you mean llama-3.1-8b"),
            ("accelerator", "H100-80", "did you mean H100-80GB"),
            ("model", "a-model-of-ours", "add it there, or remove the entry"),
        ],
    )
    def test_a_figure_of_what_nobody_describes(
        self, tmp_path: Path, key: str, value: str, remedy: str
    ) -> None:
        figure = CATALOG.figures[0].model_dump(exclude_none=True) | {"source": "us", key: value}
        source = {"title": "ours", "url": "https://example.com", "licence": "ours"}
        text = yaml.safe_dump(
            {"published": "ours", "sources": {"us": source}, "figures": [figure]}, sort_keys=False
        )
        (tmp_path / "published").mkdir()
        (tmp_path / "published" / "ours.yaml").write_text(text)
        with pytest.raises(BadRequest) as caught:
            read_catalog([tmp_path])
        assert f"ours.yaml: figures.0.{key} is '{value}', which no file" in str(caught.value)
        assert remedy in str(caught.value)

    def test_a_shape_that_is_none(self, tmp_path: Path) -> None:
        known = {"source": "https://x.org/c", "parameters_b": 1.0, "config": {"hidden_size": 9}}
        text = yaml.safe_dump({"models": "ours", "known": {"ours-1b": known}}, sort_keys=False)
        (tmp_path / "models").mkdir()
        path = tmp_path / "models" / "ours.yaml"
        path.write_text(text)
        with pytest.raises(BadRequest, match=r"known\.ours-1b\.config: describes no model"):
            read_catalog([tmp_path])
        found = check([(str(path), parse(text))])
        assert [(problem.field, problem.line) for problem in found] == [("known.ours-1b.config", 6)]


def test_check_names_the_line_of_a_figure() -> None:
    text = "published: x\nsources: {}\nfigures:\n  - {source: a, tokens: 3}\n"
    found = check([("x.yaml", parse(text))])
    assert ("figures[0].tokens", 4) in [(problem.field, problem.line) for problem in found]


def test_every_folder_is_shipped() -> None:
    assert all(list((packaged() / kind).glob("*.yaml")) for kind in FOLDERS)


class TestKnownModels:
    @pytest.mark.parametrize("name", CATALOG.models)
    def test_sizes_add_up_to_what_is_published(self, name: str) -> None:
        known = CATALOG.models[name]
        counted = architecture_of(name, known.config).parameters / 1e9
        assert counted == pytest.approx(known.parameters_b, rel=0.005)

    def test_mixtures_compute_with_fewer(self) -> None:
        models = architectures(CATALOG.models)
        assert models["mixtral-8x7b"].active == pytest.approx(12.9e9, rel=0.02)
        assert models["deepseek-v3"].active == pytest.approx(37e9, rel=0.02)
        assert models["qwen3-235b-a22b"].active == pytest.approx(22e9, rel=0.03)
        assert models["llama-3.1-8b"].active < models["llama-3.1-8b"].parameters

    def test_caches_are_what_their_papers_say(self) -> None:
        models = architectures(CATALOG.models)
        assert models["llama-3.1-8b"].cached(1) * 2 == 128 * 1024  # bytes a token in 16 bits
        assert models["llama-2-7b"].cached(1) * 2 == 512 * 1024
        assert models["deepseek-v3"].cached(1) == 61 * 576  # arXiv:2412.19437: latent 512, rope 64
        assert models["minilm"].cached(100) == 0

    def test_windows_bound_the_cache(self) -> None:
        config = {**CATALOG.models["mistral-7b"].config, "sliding_window": 1024}
        windowed = architecture_of("m", config)
        assert windowed.cached(10_000) == windowed.cached(1024)
        half = architecture_of("g", {**config, "sliding_window_pattern": 2})
        assert half.windowed_layers == 16

    def test_experts_touched_grow_with_the_batch(self) -> None:
        model = architectures(CATALOG.models)["qwen3-30b-a3b"]
        assert model.touched(1) == pytest.approx(model.active)
        assert model.touched(10_000) == pytest.approx(model.parameters - model.lookup, rel=0.001)

    @pytest.mark.parametrize(
        ("config", "field"),
        [
            ({}, "hidden_size"),
            ({"hidden_size": "big"}, "hidden_size"),
            ({"hidden_size": 8, "num_hidden_layers": 0}, "num_hidden_layers"),
            ({"state_size": 16, "hidden_size": 8}, "model_type"),
        ],
    )
    def test_what_cannot_be_counted_is_said(self, config: dict[str, object], field: str) -> None:
        with pytest.raises(UnknownArchitecture) as error:
            architecture_of("x", config)
        assert error.value.field == field
