"""Traces, metrics and logs: every name in `names`, one set-up, one record per request."""
