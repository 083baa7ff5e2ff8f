"""Templates, incremental detokenising and stop strings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearfield.core.errors import BadRequest
from nearfield.serving.engines.text import StopScanner, TextModel

from tests.support.tiny_lms import byte_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return TextModel(directory)


def test_chat_is_what_transformers_makes_of_it(text: TextModel) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "grüß "}, {"type": "text", "text": "dich"}],
        },
    ]
    plain = [messages[0], {"role": "user", "content": "grüß dich"}]
    expected = byte_tokenizer().apply_chat_template(
        plain, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert text.chat(messages, (), {}) == expected


def test_templates_are_sandboxed(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BadRequest, match="refuses"):
        TextModel(tmp_path, hostile).chat([{"role": "user", "content": "x"}], (), {})


def test_a_template_may_refuse_and_is_quoted(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    model = TextModel(tmp_path, "{{ raise_exception('only one turn') }}")
    with pytest.raises(BadRequest, match="only one turn") as raised:
        model.chat([{"role": "user", "content": "x"}], (), {})
    assert raised.value.param == "messages"


def test_no_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadRequest, match=r"engine\.chat_template"):
        TextModel(tmp_path).chat([], (), {})


def test_eos_ids_come_from_every_file_that_names_one(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert TextModel(tmp_path).eos_ids == {1, 2, 3, 256}


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadRequest, match=r"tokenizer_config\.json"):
        TextModel(tmp_path)


@given(st.text(min_size=1, max_size=40))
def test_streaming_gives_the_same_text_as_decoding_at_once(text: TextModel, value: str) -> None:
    stream = text.decoder()
    ids = text.encode(value, special=False)
    assert "".join(text.step(stream, token) for token in ids) == value


def test_a_token_is_its_bytes(text: TextModel) -> None:
    first, second = text.encode("é", special=False)
    assert text.token(first)[1] + text.token(second)[1] == "é".encode()


@given(
    st.text("abc", max_size=60),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_stop_strings_are_found_however_the_text_is_cut(
    value: str, stops: list[str], size: int
) -> None:
    scanner = StopScanner(tuple(stops))
    out = ""
    for i in range(0, len(value), size):
        piece, stop = scanner.feed(value[i : i + size])
        out += piece
        if stop is not None:
            assert value.startswith(out + stop)
            assert not any(s in out for s in stops)
            return
    out += scanner.flush()
    assert out == value
    assert not any(s in value for s in stops)


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopScanner(()).feed("abc") == ("abc", None)
