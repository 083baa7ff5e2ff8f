"""`nearfield plan` as it is used: the table, the document, the files, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from nearfield.cli.main import main
from nearfield.cli.market import wanted_regions
from nearfield.cli.model_sizes import model_size
from nearfield.core import catalog_files
from nearfield.core.catalog_files import read_catalog
from nearfield.core.errors import BadRequest

CATALOG = read_catalog()
CONFIG = CATALOG.models["llama-3.1-8b"].config


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEARFIELD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    # Read once for all of these tests; a folder of one's own is read in each.
    monkeypatch.setattr(
        catalog_files, "read_catalog", lambda own=(): read_catalog(own) if own else CATALOG
    )


def run(line: str) -> int:
    return main(["plan", *line.split()])


def planned(capsys: pytest.CaptureFixture[str], line: str) -> dict[str, Any]:
    code = run(f"{line} --json")
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    document["code"] = code
    return document


class TestTheTable:
    def test_tells_the_choice_the_others_and_what_it_rests_on(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("llama-3.1-8b --rps 20 --slo-ttft-ms 500 --regions eu-west,us-east=15") == 0
        text = capsys.readouterr().out
        assert "llama-3.1-8b: 8.0 billion parameters, checkpoint in bf16" in text
        assert "first token within 500 ms (p95)" in text
        assert re.search(r"^eu-west +\S.* bf16 .*on-demand .* ms .*\$\d", text, re.M)
        assert re.search(r"^us-east ", text, re.M)
        assert re.search(r"eu-west: \d.* in [a-z]+-?[a-z]*\d*\. A replica carries", text)
        assert re.search(r"weights take 16\.1, cache \d+\.\d+ \(\d+ fit\)", text)
        assert "Why not, in eu-west:" in text
        assert re.search(r"costs \d+% more", text)
        assert re.search(
            r"of language models that it has not seen it is off by \d+% in the median, "
            r"\d+% at worst \(\d+ figures\)",
            text,
        )
        assert re.search(r"published +list prices .*gcp 2026-07-06", text)
        assert "assumed    20% margin below the SLO" in text

    def test_all_shows_why_each_accelerator_lost(self, capsys: pytest.CaptureFixture[str]) -> None:
        run("llama-3.1-70b --rps 2 --slo-ttft-ms 300 --regions us-east --all")
        text = capsys.readouterr().out
        assert set(CATALOG.accelerators) <= set(re.findall(r"[A-Za-z0-9][\w-]+", text))
        assert "GB of bf16 weights do not fit in" in text
        assert "the first token takes" in text
        assert "none of our engines runs on it" in text
        assert "no dense compute rate is published" in text
        assert "no price of it in us-east" in text

    def test_what_is_not_rechecked_is_said_where_it_decides(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prices = {
            "prices": "mine",
            "spot": "absent",
            "source": {"title": "mine", "url": "https://example.com", "licence": "none"},
            "machines": {"box": {"accelerator": "A10G", "count": 8}},
            "offers": {"here": {"box": {"on_demand_usd_h": 1.0}}},
        }
        (tmp_path / "own" / "prices").mkdir(parents=True)
        (tmp_path / "own" / "prices" / "mine.yaml").write_text(yaml.safe_dump(prices))
        run("llama-3.1-8b --rps 1 --catalog own --providers mine")
        assert "A10G: not re-checked: dense.bf16, dense.int8" in capsys.readouterr().out

    def test_one_that_cannot_be_is_said_and_exits_1(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("llama-3.1-8b --rps 2 --slo-ttft-ms 1") == 1
        text = capsys.readouterr().out
        assert "nothing in the catalogue can carry this" in text
        assert "relax the SLO" in text


class TestTheDocument:
    def test_holds_everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = planned(capsys, "llama-3.1-8b --rps 20 --slo-ttft-ms 500 --regions eu-west")
        assert found["code"] == 0
        assert found["feasible"]
        (region,) = found["regions"]
        choice = region["choice"]
        assert choice["modelled"]["ttft_p95_ms"] <= 500 / 1.2
        assert choice["modelled"]["replica_rps"] * choice["replicas_needed"] >= 20 * 1.2
        assert sum(part["usd_h"] for part in choice["parts"]) == pytest.approx(choice["usd_h"])
        assert found["usd_month"] == pytest.approx(choice["usd_h"] * 730, rel=1e-3)
        assert region["usd_per_million_tokens"] == pytest.approx(
            choice["usd_h"] / (20 * 3600 * 1250) * 1e6, rel=1e-3
        )
        assert len(region["alternatives"]) == len(CATALOG.accelerators) - 1
        assert found["model_error"]["held_out"]["figures"] >= 100
        assert found["prices"]["aws"]["spot"] == "derived"
        # Only regions under the same law, and near.
        assert re.match(r"europe-|northeurope|westeurope|france|germany", choice["place"])

    def test_the_checkpoints_precision_unless_another_is_allowed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = "llama-3.1-70b --rps 10 --regions us-east"
        own = planned(capsys, asked)
        eight = planned(capsys, f"{asked} --precision fp8")
        free = planned(capsys, f"{asked} --precision any")
        assert own["regions"][0]["choice"]["precision"] == "bf16"
        assert eight["regions"][0]["choice"]["precision"] == "fp8"
        assert free["usd_month"] <= eight["usd_month"] < own["usd_month"]
        native = planned(capsys, "deepseek-r1 --rps 1")
        assert native["regions"][0]["choice"]["precision"] == "fp8"

    def test_embeddings_have_no_answer(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = planned(capsys, "minilm --rps 500 --input-tokens 128 --slo-ttft-ms 50")
        assert found["workload"]["tokens_out"] == 0
        assert found["regions"][0]["choice"]["modelled"]["ttft_p95_ms"] <= 50

    def test_embeddings_run_where_their_engine_does(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (region,) = planned(capsys, "bge-large --rps 500 --input-tokens 256")["regions"]
        lost = {each["accelerator"]: each["reason"] for each in region["alternatives"]}
        for name, row in CATALOG.accelerators.items():
            elsewhere = lost.get(name) == "our embedding engine does not run on it"
            runs = row.family in ("nvidia", "amd", "cpu") or row.engine == "remote"
            assert elsewhere != runs, name

    def test_a_few_texts_a_second_are_a_processors(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = planned(
            capsys, "minilm --rps 20 --input-tokens 64 --providers aws --write embed.yaml"
        )
        choice = found["regions"][0]["choice"]
        assert (choice["accelerator"], choice["precision"]) == ("EPYC-9654-8c", "fp32")
        assert found["model"]["checkpoint_precision"] is None
        assert found["model_error"]["held_out_by_family"]["cpu"]["figures"] == 0
        app = yaml.safe_load((tmp_path / "embed.yaml").read_text())["applications"][0]
        assert "dtype" not in app["args"]  # float32, for which the packed graph is built
        assert app["deployments"][0]["ray_actor_options"]["num_cpus"] == 7
        assert main(["check", "embed.yaml"]) == 0

    def test_the_error_told_is_that_of_models_like_it(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        generates = planned(capsys, "llama-3.1-8b --rps 1")["model_error"]
        embeds = planned(capsys, "minilm --rps 1 --input-tokens 128")["model_error"]
        assert generates["held_out"]["figures"] + embeds["held_out"]["figures"] == sum(
            figure.use == "check" for figure in CATALOG.figures
        )
        assert embeds["fitted"]["figures"] == 0
        assert embeds["fitted"]["median"] is None
        run("minilm --rps 1 --input-tokens 128")
        assert "of encoders that it has not seen" in capsys.readouterr().out

    def test_without_spot_there_is_none_and_it_costs_more(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = "llama-3.1-8b --rps 40 --slo-ttft-ms 500 --regions gcp/us-east4"
        mixed, plain = planned(capsys, asked), planned(capsys, f"{asked} --no-spot")
        capacities = {part["capacity"] for part in mixed["regions"][0]["choice"]["parts"]}
        assert capacities == {"on-demand", "spot"}
        assert [p["capacity"] for p in plain["regions"][0]["choice"]["parts"]] == ["on-demand"]
        assert plain["usd_month"] > mixed["usd_month"]

    def test_small_clouds_serve_anywhere_only_if_asked(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = planned(capsys, "llama-3.1-8b --rps 1 --providers small-clouds")
        assert found["regions"][0]["choice"]["provider"] == "small-clouds"
        with pytest.raises(BadRequest, match="no cloud region with prices is under the law"):
            wanted_regions("eu-west", CATALOG, ["small-clouds"], 1500)


class TestOnPremises:
    ASKED = "llama-3.1-8b --rps 100 --regions us-east --on-prem L40S --capex-usd 90000"

    def test_the_break_even_follows_from_what_is_assumed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = planned(capsys, self.ASKED)["on_premises"]
        hourly = 90_000 / (4 * 8760) + 90_000 * 0.08 / 8760 + 1.4 * 8 * 0.35 * 1.4 * 0.12
        assert found["usd_month"] == pytest.approx(found["machines"] * hourly * 730, rel=1e-3)
        assert found["break_even_utilisation"] == pytest.approx(
            found["usd_month"] / found["cloud_usd_month"], rel=1e-3
        )

    def test_is_told_in_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        run(self.ASKED)
        text = capsys.readouterr().out
        assert re.search(r"Owning is cheaper above \d+% of the hours at this load", text)
        run(self.ASKED.replace("90000", "9000000"))
        assert "The cloud is cheaper even at full use" in capsys.readouterr().out


class TestWritten:
    @pytest.mark.parametrize(
        "asked",
        [
            "llama-3.1-8b --rps 20 --slo-ttft-ms 500 --regions eu-west",
            "llama-3.1-70b --rps 20 --precision fp8 --regions us-east --no-spot",
            "minilm --rps 500 --input-tokens 128 --regions us-east",
            "llama-3.1-8b --rps 20 --regions gcp/us-west4 --providers gcp-tpu",
            "qwen2.5-0.5b --rps 5 --providers aws --precision int4",
        ],
    )
    def test_it_passes_check(self, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(f"{asked} --write chat.yaml") == 0
        assert main(["check", "--no-ray", "chat.yaml"]) == 0, capsys.readouterr().err

    def test_it_says_what_the_plan_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        asked = "llama-3.1-70b --rps 30 --slo-ttft-ms 800 --precision fp8 --regions us-east"
        found = planned(capsys, f"{asked} --write chat.yaml")
        assert found["written"] == ["chat.yaml"]
        choice = found["regions"][0]["choice"]
        applications = yaml.safe_load(Path("chat.yaml").read_text())["applications"]
        assert [app["args"]["pool"]["name"] for app in applications] == [
            part["capacity"] for part in choice["parts"]
        ]
        for app, part in zip(applications, choice["parts"], strict=True):
            engine, options = app["args"]["engine"], app["deployments"][0]["ray_actor_options"]
            assert engine["tensor_parallel_size"] == choice["tensor_parallel"]
            assert engine["quantization"] == "fp8"
            assert engine["engine_args"]["max_num_seqs"] == choice["modelled"]["replica_running"]
            assert options["num_gpus"] == choice["tensor_parallel"]
            assert options["label_selector"]["ray.io/market-type"] == part["capacity"]
            accelerator = CATALOG.accelerators[choice["accelerator"]]
            label = options["label_selector"]["ray.io/accelerator-type"]
            assert label == accelerator.ray.accelerator_type
            assert app["args"]["source"] == "hf://meta-llama/Llama-3.1-70B"

    def test_a_tpu_is_asked_for_as_ray_calls_it(self) -> None:
        asked = "llama-3.1-8b --rps 20 --regions gcp/us-west4 --providers gcp-tpu --no-spot"
        run(f"{asked} --write chat.yaml")
        (app,) = yaml.safe_load(Path("chat.yaml").read_text())["applications"]
        options = app["deployments"][0]["ray_actor_options"]
        assert options["resources"]["TPU"] == app["args"]["engine"]["tensor_parallel_size"]
        assert options["label_selector"]["ray.io/accelerator-type"] == "TPU-V5LITEPOD"

    def test_several_regions_are_several_files(self) -> None:
        asked = "llama-3.1-8b --rps 20 --regions eu-west,us-east --write chat.yaml"
        assert run(asked) == 0
        assert {path.name for path in Path().glob("chat*")} == {
            "chat.eu-west.yaml",
            "chat.us-east.yaml",
        }

    def test_nothing_is_overwritten(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("chat.yaml").write_text("mine")
        assert run("llama-3.1-8b --rps 1 --write chat.yaml") == 2
        assert "nothing is overwritten" in capsys.readouterr().err
        assert Path("chat.yaml").read_text() == "mine"


class TestTheModel:
    def test_by_its_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float16"}))
        for given in (str(tmp_path), str(tmp_path / "config.json")):
            size = model_size(given, CATALOG.models)
            assert size.architecture.parameters == pytest.approx(8.03e9, rel=1e-3)
            assert size.precision == "fp16"
            assert size.source == f"file://{tmp_path}"

    def test_by_our_own_file(self, tmp_path: Path) -> None:
        root = Path(__file__).parents[2] / "deployments" / "models"
        chat = model_size(str(root / "chat.yaml"), CATALOG.models)
        assert (chat.name, chat.source) == ("chat", "builtin://abacus")
        assert 1.5e6 < chat.architecture.parameters < 1.8e6
        assert model_size(str(root / "embed.yaml"), CATALOG.models).architecture.task == "embed"
        with pytest.raises(BadRequest, match=r"args\.source is missing"):
            model_size(str(root / "remote.yaml"), CATALOG.models)

    @pytest.mark.parametrize(
        "given",
        [
            "llama-3.1-8b",
            "Llama-3.1-8B-Instruct",
            "meta-llama/Meta-Llama-3.1-8B-Instruct",
            "hf://meta-llama/Llama-3.1-8B@main",
        ],
    )
    def test_by_a_known_name_nobody_is_asked(self, given: str) -> None:
        assert model_size(given, CATALOG.models).architecture.hidden == 4096

    def test_from_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def answer(url: str, **_: Any) -> httpx.Response:
            asked.append(url)
            return httpx.Response(200, json={**CONFIG, "quantization_config": QUANTISED})

        monkeypatch.setattr(httpx, "get", answer)
        size = model_size("hf://someone/theirs@v2", CATALOG.models)
        assert asked == ["https://huggingface.co/someone/theirs/resolve/v2/config.json"]
        assert size.precision == "int4"
        assert size.source == "hf://someone/theirs@v2"

    @pytest.mark.parametrize(
        ("status", "said"),
        [(401, "set HF_TOKEN"), (404, "is answered 404"), (None, "ConnectError")],
    )
    def test_a_hub_that_does_not_give_it(
        self, status: int | None, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def answer(url: str, **_: Any) -> httpx.Response:
            if status is None:
                raise httpx.ConnectError("no")
            return httpx.Response(status)

        monkeypatch.setattr(httpx, "get", answer)
        with pytest.raises(BadRequest, match=said):
            model_size("hf://someone/theirs", CATALOG.models)

    @pytest.mark.parametrize(
        ("quantised", "precision"),
        [
            ({"quant_method": "fp8"}, "fp8"),
            ({"quant_method": "awq", "bits": 4}, "int4"),
            ({"quant_method": "gptq", "bits": 8}, "int8"),
            ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
            ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "int8"),
        ],
    )
    def test_what_a_checkpoint_is_quantised_to(
        self, quantised: dict[str, Any], precision: str, tmp_path: Path
    ) -> None:
        config = {**CONFIG, "quantization_config": quantised}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert model_size(str(tmp_path), CATALOG.models).precision == precision


QUANTISED = {"quant_method": "awq", "bits": 4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("lama-3.1-8b --rps 2", "did you mean llama-3.1-8b?"),
        ("llama-3.1-8b", "--rps"),
        ("llama-3.1-8b --rps 0", "--rps"),
        ("llama-3.1-8b --rps 2 --regions eu-wst", "did you mean eu-west?"),
        ("llama-3.1-8b --rps 2 --regions gcp/europe-west44", "did you mean gcp/europe-west4?"),
        ("llama-3.1-8b --rps 2 --regions eu-west,eu-west", "names eu-west twice"),
        ("llama-3.1-8b --rps 2 --regions eu-west=many", "a number above 0: eu-west=20"),
        ("llama-3.1-8b --rps 2 --regions eu-west=3", "raise --rps to their sum"),
        ("llama-3.1-8b --rps 5 --regions eu-west=3", "leave one region without =RPS"),
        (
            "llama-3.1-8b --rps 2 --regions eu-west --providers gcp --within-km 1",
            "raise --within-km",
        ),
        ("llama-3.1-8b --rps 2 --providers awz", "did you mean aws?"),
        ("llama-3.1-8b --rps 2 --precision fp9", "is none of bf16, fp16, fp8, int8, int4"),
        ("minilm --rps 2 --input-tokens 9 --precision int8", "--precision: an embedding model is"),
        ("minilm --rps 2", "--input-tokens 128"),
        ("llama-3.1-8b --rps 2 --context 10", "is shorter than a request of 1250 tokens"),
        ("llama-3.1-8b --rps 2 --context 999999", "more than the 131,072 that llama-3.1-8b"),
        ("llama-3.1-8b --rps 2 --output-tokens 0", "this model generates"),
        ("llama-3.1-8b --rps 2 --on-prem H10", "is not in the catalogue"),
        ("llama-3.1-8b --rps 2 --on-prem L40S", "--capex-usd is missing"),
        ("llama-3.1-8b --rps 2 --on-prem TPU-v5e --capex-usd 9", "--power-w is missing"),
        ("llama-3.1-8b --rps 2 --on-prem WSE-3 --capex-usd 9", "none of our engines runs on it"),
        ("s3://bucket/model --rps 2", "give its config.json"),
        ("nothing.yaml --rps 2", "does not exist"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llama-3.1-8b", "hf://meta-llama/Llama-3.1-8B"),
        ("deepseek-r1", "hf://deepseek-ai/DeepSeek-R1"),
        ("bge-large", "hf://BAAI/bge-large-en-v1.5"),
        ("hf://meta-llama/Llama-3.1-8B-Instruct", "hf://meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama-3.1-8B-Instruct", None),
    ],
)
def test_what_is_written_is_the_model_that_was_named(name: str, source: str | None) -> None:
    """Not another one of the same shape."""
    assert model_size(name, CATALOG.models).source == source


def test_weights_nobody_named_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Llama-3.1-8B-Instruct --rps 1 --write chat.yaml") == 2
    assert "plan for hf://org/model" in capsys.readouterr().err
    assert not Path("chat.yaml").exists()


def test_a_file_says_what_it_needs_that_nobody_has_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "llama-3.1-8b --rps 1 --regions us-east"
    for precision in ("int4", "fp8"):
        assert run(f"{asked} --precision {precision} --write {precision}.yaml") == 0
    assert "let `source` name a checkpoint that is" in (tmp_path / "int4.yaml").read_text()
    assert "does not quantise" not in (tmp_path / "fp8.yaml").read_text()


def test_a_shape_may_have_another_context() -> None:
    assert model_size("llama-3-8b", CATALOG.models).architecture.context == 8192
    assert model_size("llama-3.1-8b", CATALOG.models).architecture.context == 131_072


def test_a_budget_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "llama-3.1-8b --rps 20 --max-usd 10 --write chat.yaml"
    assert run(asked) == 1
    assert "the cheapest plan costs" in capsys.readouterr().err
    assert not Path("chat.yaml").exists()
