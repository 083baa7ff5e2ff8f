"""The example project, as its README runs it: from its own directory, outside of the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from nearfield.cli.main import main
from tritonclient.http import InferenceServerClient, InferInput

if TYPE_CHECKING:
    from tests.integration.conftest import TestRegion

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_engine"

SENTENCES = {
    "en": ("I would like a cup of tea with milk.", "She forgot her keys at the office."),
    "de": ("Ich hätte gern eine Tasse Tee mit Milch.", "Sie hat ihre Schlüssel vergessen."),
    "fr": ("Je voudrais une tasse de thé avec du lait.", "Elle a oublié ses clés au bureau."),
    "es": ("¿Dónde está la estación?", "Ella olvidó sus llaves en la oficina."),
    "it": ("Dov'è la stazione?", "Ha dimenticato le chiavi in ufficio."),
    "nl": ("Ik wil graag een kop thee met melk.", "Ze is haar sleutels op kantoor vergeten."),
}


def test_custom_engine(region: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's class, served and asked through a client that no one here wrote."""
    config = str(EXAMPLE / "language.yaml")
    assert main(["check", "--no-ray", config]) == 0
    assert main(["serve", config, "--dir", str(region.region.root)]) == 0
    assert f"language answers at {region.url('language')}" in capsys.readouterr().out

    client = InferenceServerClient(region.url("language").removeprefix("http://"))
    texts = [text.encode() for pair in SENTENCES.values() for text in pair]
    given = InferInput("text", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array(texts, dtype=object))
    answer = client.infer("language", [given])
    found = [name.decode() for name in cast("np.ndarray", answer.as_numpy("language"))]
    assert found == [language for language in SENTENCES for _ in range(2)]
    assert (cast("np.ndarray", answer.as_numpy("score")) > 0.5).all()
    region.remove("language")
