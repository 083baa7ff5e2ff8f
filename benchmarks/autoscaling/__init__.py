"""The scaling policy against baselines, on recorded traffic."""
