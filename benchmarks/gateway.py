"""What an operator does before a gateway first starts: files, secrets, a store, a tenant, a key.

    python -m benchmarks.gateway FOLDER PORT SERVE_PORT

Afterwards `python -m nearfield.edge FOLDER/gateway.yaml` is a gateway at PORT, before the region
whose ingress is at SERVE_PORT. Callers need a key, which has limits, and so has its tenant: all of
them are counted for every request, and none is ever reached.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nearfield.api.keys import Key, Scope, key_mac
from nearfield.api.passport import PassportKeys
from nearfield.policy.quota import Limits
from nearfield.store.administration import Administration, open_pepper
from nearfield.store.forms import LimitsForm, NewTenant
from nearfield.store.sql import Store

from benchmarks.workload import KEY, KEY_ID

TENANT = "bench"
REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE = 10**8, 10**11
REGION = {
    "region": "eu-west",
    "jurisdiction": "eu",
    "city": "Dublin",
    "location": {"latitude": 53.33, "longitude": -6.25},
}


def prepare(folder: Path, port: int, serve_port: int) -> None:
    """Write what the gateway needs. Its NEARFIELD_HOME must be `folder`."""
    url = f"sqlite:///{folder / 'nearfield.sqlite3'}"
    file = {
        "gateway": REGION["region"],
        "home": {"region": REGION["region"], "serve": f"http://127.0.0.1:{serve_port}"},
        "regions": ["region.yaml"],
        "listen": {"port": port},
        "store": url,
        "passport_keys": "passports.json",
    }
    # YAML is a superset of JSON.
    (folder / "region.yaml").write_text(json.dumps(REGION))
    (folder / "gateway.yaml").write_text(json.dumps(file))
    PassportKeys.generate().save(folder / "passports.json")
    store = Store(url)
    try:
        pepper = open_pepper(store, folder / "key-pepper")
        form = LimitsForm(
            requests_per_minute=REQUESTS_PER_MINUTE, tokens_per_minute=TOKENS_PER_MINUTE
        )
        limits = form.onto(Limits())
        Administration(store, pepper).create_tenant(NewTenant(name=TENANT, limits=form))
        # `nearfield keys create` would draw a key; this one the clients of all sides know.
        digest = key_mac(pepper)(KEY.encode()).hex()
        inference: frozenset[Scope] = frozenset({"inference"})
        store.directory.add_key(Key(KEY_ID, TENANT, None, "", inference, None, digest, limits))
    finally:
        store.close()


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
