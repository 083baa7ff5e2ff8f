"""What computes inside a replica. `table.py` lists the engines; `base.py` is their protocol."""
