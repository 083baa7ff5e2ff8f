"""The gateway: the process that clients reach.

It authenticates, admits, chooses an endpoint and forwards.
"""
