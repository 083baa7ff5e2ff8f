"""Several regions on one machine, as far as it needs no Ray: files, plans, states, gateways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from nearfield.cli import federation as federations
from nearfield.cli import region as regions
from nearfield.cli import region_files
from nearfield.cli.commands import up_regions
from nearfield.cli.federation import Federation, Options, Plan
from nearfield.cli.main import main
from nearfield.cli.snippets import examples
from nearfield.core.errors import BadRequest, Conflict, NotFound
from nearfield.core.federation import RegionFile
from nearfield.core.spec import ModelSpec
from nearfield.edge import files

from tests.unit.test_region import state

ROOT = Path(__file__).parents[2]
NAMES = ["asia-south", "eu-west", "us-east"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEARFIELD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


# Files of the package


def test_the_package_has_the_regions_that_cluster_configs_shows() -> None:
    """An installed wheel has its own copy, beside the models; there is one truth."""
    packaged = region_files.packaged()
    assert sorted(packaged) == NAMES
    for name, path in packaged.items():
        shown = (ROOT / "cluster_configs" / "regions" / f"{name}.yaml").read_text()
        assert path.read_text() == shown.replace("../../deployments/models/", "../")
        assert files.read_region(path).region == name
        assert all(
            model.exists() for model in region_files.models_of(path, files.read_region(path))
        )


def test_a_region_is_meant_by_its_name_or_by_a_path() -> None:
    assert region_files.path_of("eu-west").parts[-2:] == ("regions", "eu-west.yaml")
    assert region_files.path_of("./eu-west") == Path("eu-west")
    assert region_files.path_of("mine.yaml") == Path("mine.yaml")
    with pytest.raises(BadRequest, match=r"did you mean eu-west\? It has asia-south, eu-west"):
        region_files.path_of("eu-wset")


# Plans


def test_a_region_runs_the_models_of_its_file_or_those_given() -> None:
    for plan in up_regions.plans(["eu-west", "us-east"], []):
        assert [app["name"] for app in plan.applications] == ["chat", "embed"]
        assert plan.serve_options["http_options"]["port"] == 8000
    embed = str(ROOT / "deployments" / "models" / "embed.yaml")
    for plan in up_regions.plans(["eu-west", "us-east"], [embed]):
        assert [app["name"] for app in plan.applications] == ["embed"]


def test_plans_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadRequest, match="names the region eu-west twice"):
        up_regions.plans(["eu-west", "eu-west"], [])
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "region: mine\njurisdiction: eu\ncity: Vienna\n"
        "location: {latitude: 48.2, longitude: 16.4}\n"
    )
    with pytest.raises(BadRequest, match="names no models: add models"):
        up_regions.plans(["./mine.yaml"], [])
    broken = str(ROOT / "tests" / "unit" / "broken_configs" / "dtype.yaml")
    assert main(["up", "--regions", "eu-west", broken]) == 2
    assert "did you mean float16?" in capsys.readouterr().err
    mine.write_text("region: mine\n")
    assert main(["up", "--regions", "./mine.yaml"]) == 2
    assert "jurisdiction is missing" in capsys.readouterr().err
    assert not (tmp_path / "home").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keys"], "--keys and --store go with --regions"),
        (["--regions", "eu-west", "--dir", "here"], "--dir is one region's"),
        (["--regions", " , "], "--regions names no region"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", *arguments]) == 2
    assert said in capsys.readouterr().err


# What is written down


def plan(name: str, jurisdiction: str = "eu") -> Plan:
    file = RegionFile.model_validate(
        {
            "region": name,
            "jurisdiction": jurisdiction,
            "city": "Kraków",
            "location": {"latitude": 50.06, "longitude": 19.94},
        }
    )
    return Plan(file, [])


def planned(home: Path, *plans: Plan, **options: object) -> Federation:
    federations.folder_of(home).mkdir(parents=True)
    made = federations._planned(home, plans, Options(**options))  # type: ignore[arg-type]
    federations.write(made)
    return made


def test_it_is_found_again(home: Path) -> None:
    with pytest.raises(NotFound, match="nearfield up --regions"):
        federations.find(home)
    made = planned(home, plan("one"), plan("two", "us"), store="sqlite:////x", detached=True)
    found = federations.find(home)
    assert replace(found, reservations=made.reservations) == made
    assert found["two"].jurisdiction == "us"
    assert len({member.gateway_url for member in found}) == 2
    assert len({member.grpc for member in found}) == 2
    assert [member.region_condition() for member in found] == ["ended", "ended"]
    assert [member.gateway_condition() for member in found] == ["ended", "ended"]
    with pytest.raises(NotFound, match="no region 'three' here: one, two"):
        found["three"]


def test_gateways_are_told_where_each_other_is(home: Path) -> None:
    made = planned(home, plan("one"), plan("two"), store="sqlite:////x", host="0.0.0.0")
    federations._write_region_files(made, [plan("one"), plan("two")])
    running = regions.Region(home / "regions" / "one", state(port=8001))
    options = Options(host="0.0.0.0", gateway={"console": "anybody"})
    federations._write_gateway_file(made, made["one"], running, options)
    read = files.read(made["one"].gateway.file)
    assert read.gateway.home is not None
    assert read.gateway.home.serve == "http://127.0.0.1:8001"
    assert read.gateway.listen.host == "0.0.0.0"
    assert read.gateway.console == "anybody"
    assert read.beside(str(read.gateway.passport_keys)).resolve() == made.passport_keys.resolve()
    assert {each.region: each.gateway_url for each in read.regions} == {
        name: made[name].gateway_url for name in ("one", "two")
    }
    assert made["one"].gateway_url.startswith("http://127.0.0.1:"), "not 0.0.0.0"
    assert "Kraków" in (made.folder / "regions" / "one.yaml").read_text()


def test_only_one_runs_in_a_home(home: Path) -> None:
    owned = planned(home, plan("one"))
    with pytest.raises(Conflict, match="Regions already run here: one"):
        federations.start(home, [plan("one")], Options(), print)
    # As if its owner had been killed: what it left is cleaned up.
    path = owned.folder / "federation.json"
    data = json.loads(path.read_text())
    data["owner"]["started"] = "0"
    path.write_text(json.dumps(data))
    federations._make_room(home, print)
    assert federations.read(home) is None


def test_another_versions_state_is_left_alone(home: Path) -> None:
    made = planned(home, plan("one"))
    path = made.folder / "federation.json"
    path.write_text(json.dumps({"version": 99}))
    with pytest.raises(Conflict, match="another version"):
        federations.read(home)


def test_commands_without_a_federation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down", "--region", "eu-west"]) == 0
    assert main(["status", "--region", "eu-west"]) == 1
    assert main(["status", "--region", "../eu-west"]) == 2
    assert "no region's name" in capsys.readouterr().err


# Words


def test_examples_take_the_key_from_the_environment_where_one_is_needed() -> None:
    args = {"model": "chat", "engine": "generate", "source": "builtin://abacus"}
    models = [("http://127.0.0.1:8080", ModelSpec.model_validate(args))]
    (_, curl), (_, python) = examples(models, keyed=True)
    assert '-H "authorization: Bearer $OPENAI_API_KEY"' in curl
    assert 'OpenAI(base_url="http://127.0.0.1:8080/v1")' in python
    (_, curl), (_, python), _ = examples(models)
    assert "authorization" not in curl
    assert 'api_key="none"' in python
