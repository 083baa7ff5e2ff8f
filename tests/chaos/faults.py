"""What goes wrong: processes that are killed or frozen, and networks that are cut.

Everything here blocks for a moment: under load it is called in a thread, and what can be looked up
before the moment of the fault is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import Literal

import psutil

from tests.chaos.world import POLL_S, Cluster, World
from tests.support.processes import until

FIND_S = 30.0
PROXY_S = 90.0
Way = Literal["to", "from"]


def send(pids: Iterable[int], number: signal.Signals) -> float:
    """Send a signal to all of these; returns when the first of them got it."""
    began_s = time.monotonic()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return began_s


def replicas(cluster: Cluster) -> dict[int, int]:
    """The processes of its replicas: pid by the port that each listens on."""
    found = {}
    for pid in cluster.pids("ServeReplica"):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = pid
    return found


def busiest_replica(world: World, cluster: Cluster, *, least: int) -> tuple[int, int]:
    """Pid of the replica with the most requests in flight, and how many, once there are enough."""
    pids = replicas(cluster)
    found: tuple[int, int] = (0, 0)

    def busy() -> bool:
        nonlocal found
        regions = world.status(cluster.name)["regions"]
        endpoints = next(r["endpoints"] for r in regions if r["name"] == cluster.name)
        each = [replica for endpoint in endpoints for replica in endpoint["each"]]
        most = max(each, key=lambda replica: int(replica["in_flight"]))
        found = pids.get(most["port"], 0), most["in_flight"]
        return found[0] != 0 and found[1] >= least

    until(
        busy,
        FIND_S,
        lambda: f"the busiest replica has {found[1]} requests of {least}",
        every_s=POLL_S,
    )
    return found


def controller(cluster: Cluster) -> list[int]:
    return cluster.pids("ServeController")


def proxies(cluster: Cluster) -> list[int]:
    """Serve's own HAProxy, and the actor that keeps it, once they are there: after a kill Serve
    takes half a minute to start others."""
    until(lambda: cluster.pids("bin/haproxy"), PROXY_S, lambda: "no HAProxy", every_s=POLL_S)
    return [
        pid
        for pid in cluster.pids("haproxy", "HAProxyManager", "ProxyActor")
        if "ServeController" not in " ".join(psutil.Process(pid).cmdline())
    ]


class Partition:
    """Packets to or from a region's wire are dropped by the kernel, as a broken network drops them.

    with Partition(world.wire_port("eu-west"), "from"):
        ...
    """

    def __init__(self, port: int, way: Way) -> None:
        side = "--dport" if way == "to" else "--sport"
        self._rule = ["INPUT", "-i", "lo", "-p", "tcp", side, str(port), "-j", "DROP"]

    def __enter__(self) -> None:
        _iptables("-I", *self._rule)

    def __exit__(self, *_: object) -> None:
        _iptables("-D", *self._rule)


def no_packet_filter() -> str | None:
    """Why `Partition` does not work here; None: it does."""
    if os.geteuid() != 0:
        return "iptables needs root"
    if shutil.which("iptables") is None:
        return "iptables is not installed"
    try:
        _iptables("-L", "INPUT", "-n")
    except subprocess.CalledProcessError as error:
        return f"iptables does not work here: {error.stderr.strip()}"
    return None


def _iptables(*arguments: str) -> None:
    command = ["iptables", "-w", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def frozen(pids: Iterable[int]) -> Iterator[float]:
    """These processes stand still (SIGSTOP); gives when they began to."""
    stopped = list(pids)
    try:
        yield send(stopped, signal.SIGSTOP)
    finally:
        send(stopped, signal.SIGCONT)
