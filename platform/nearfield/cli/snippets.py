"""Copy-paste examples for the models of a region. Tests run them as they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from nearfield.cli.probe import QUESTION, SENTENCE, kind_of
from nearfield.core.spec import ModelSpec

_CHAT_CURL = """\
curl {url}/v1/chat/completions{header} -H 'content-type: application/json' \\
  -d '{{"model": "{model}", "temperature": 0,
       "messages": [{{"role": "user", "content": "{question}"}}]}}'"""

_EMBED_CURL = """\
curl {url}/v1/embeddings{header} -H 'content-type: application/json' \\
  -d '{{"model": "{model}", "input": "{sentence}"}}'"""

_CHAT_OPENAI = """\
from openai import OpenAI

client = OpenAI(base_url="{url}/v1"{key})
question = {{"role": "user", "content": "{question}"}}
for chunk in client.chat.completions.create(
    model="{model}", messages=[question], temperature=0, stream=True
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()"""

_EMBED_OPENAI = """\
from openai import OpenAI

client = OpenAI(base_url="{url}/v1"{key})
answer = client.embeddings.create(model="{model}", input=["{sentence}"])
print(answer.data[0].embedding[:3])"""

_TRITON = """\
from tritonclient.http import InferenceServerClient

client = InferenceServerClient("{authority}{path}")
print(client.is_model_ready("{model}"), client.get_model_metadata("{model}"))"""


_BEARER = ' \\\n  -H "authorization: Bearer $OPENAI_API_KEY"'


def examples(
    models: Sequence[tuple[str, ModelSpec]], *, keyed: bool = False
) -> list[tuple[str, str]]:
    """(title, code) for (base URL, spec) of each model: one per client, not one per model.

    Args:
        keyed: a key is needed, and stands in OPENAI_API_KEY.
    """
    header, key = (_BEARER, "") if keyed else ("", ', api_key="none"')
    found: list[tuple[str, str]] = []
    for kind, curl, openai in (
        ("chat", _CHAT_CURL, _CHAT_OPENAI),
        ("embeddings", _EMBED_CURL, _EMBED_OPENAI),
    ):
        if chosen := next(((u, s) for u, s in models if kind_of(s) == kind), None):
            url, spec = chosen
            words = {"url": url, "model": spec.model, "question": QUESTION, "sentence": SENTENCE}
            words |= {"header": header, "key": key}
            found.append((f"{kind} with curl", curl.format(**words)))
            found.append((f"{kind} in Python (pip install openai)", openai.format(**words)))
    if models and not keyed:
        url, spec = models[-1]
        parts = urlsplit(url)
        triton = _TRITON.format(authority=parts.netloc, path=parts.path, model=spec.model)
        found.append(("Open Inference Protocol in Python (pip install tritonclient[http])", triton))
    return found
