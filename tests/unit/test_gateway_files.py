"""A gateway's files: what they say, and what is said of those that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nearfield.edge.files import InvalidFiles, problems_of, read

from tests.support.processes import write_files


def refusal(path: Path) -> str:
    with pytest.raises(InvalidFiles) as caught:
        read(path)
    return caught.value.message


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    files = read(write_files(tmp_path, passport_keys="secrets/passports.json"))
    assert files.gateway.gateway == "eu-west"
    assert [region.city for region in files.regions] == ["Dublin"]
    assert files.beside("secrets/passports.json") == tmp_path / "secrets" / "passports.json"
    assert files.beside("/etc/keys") == Path("/etc/keys")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"listen": {"prt": 8080}}, "listen.prt unknown key"),
        ({"listen": {"port": 99999}}, "listen.port must be at most 65535 (it is 99999)"),
        ({"store": "sqlite:////tmp/x.sqlite3"}, "passport_keys is missing"),
        ({"regions": ["eu-west.yaml"]}, "did you mean eu-west.region.yaml?"),
        ({"regions": ["eu-west.region.yaml"] * 2}, "names the region eu-west twice"),
        (
            {"home": {"region": "eu-wets", "serve": "http://127.0.0.1:1"}},
            "home.region is none of the regions (it is 'eu-wets'): did you mean eu-west?",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_a_remedy(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    message = refusal(write_files(tmp_path, **changes))
    assert said in message
    assert message.startswith(str(tmp_path)), "the file is named"
    assert ": " in message.partition(said)[2] or "?" in said or "twice" in said, "and a remedy"


def test_a_region_file_is_checked_like_the_gateways(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    region = json.loads((tmp_path / "eu-west.region.yaml").read_text())
    region["location"]["latitude"] = 97
    (tmp_path / "eu-west.region.yaml").write_text(json.dumps(region))
    assert "location.latitude must be at most 90.0 (it is 97)" in refusal(path)


def test_every_problem_is_found_at_once(tmp_path: Path) -> None:
    path = write_files(tmp_path, regions=["a.yaml", "b.yaml", "c.yaml", "d.yaml"])
    assert len(problems_of(path)) == 4
    assert "and 1 more: nearfield check" in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("applications: []\n", "is no gateway file"),
        ("region: eu-west\n", "is no gateway file"),
        ("gateway: [\n", "line"),
        ("\xff", "UTF-8"),
    ],
)
def test_a_file_that_is_no_gateways(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_bytes(content.encode("latin-1"))
    assert said in refusal(path)


def test_shipped_regions_make_a_gateway(tmp_path: Path) -> None:
    shipped = sorted((Path(__file__).parents[2] / "cluster_configs" / "regions").glob("*.yaml"))
    path = write_files(tmp_path, regions=[str(each) for each in shipped])
    assert {each.jurisdiction for each in read(path).regions} == {"eu", "us", "in"}
