"""The forwarding path: a client's bytes to an upstream and back, with decisions plugged in between.

    Connection (h1, h2) one client's connection: parse strictly, frame answers, time out
        │ Request
    Exchange            one request's life: admit, pick, try, retry or hedge, relay, record
        │ Leg           asks the Gate, the Router, Retries and the Recorder (ports)
    Try                 one attempt at one target
        │
    Upstream, Pools     kept-alive connections to the targets

All of it is callbacks on one event loop: a request that meets an idle upstream connection and an
answer from memory at every port costs no task, no future and no timer. What may take time (a
connect, a port that has to ask somebody) does.
"""
