"""What is kept: tenants, products, keys, quotas, usage, idempotency. Ports and one SQL adapter.

    from nearfield.store.sql import Store

    store = Store("sqlite:////var/lib/nearfield/nearfield.sqlite3")
    store = Store("postgresql://nearfield@db/nearfield")

SQLite serves one machine, PostgreSQL several. No request waits for it: a gateway follows the keys
(`follow`) and leases quotas ahead (`shares`), and goes on with what it has when the store is gone.
"""
