"""nginx and haproxy as they are measured beside us: one process or thread, least connections over the same upstreams.

Both look up the same keys in a map, keep connections to upstreams, pass streams on unbuffered, and log nothing: what
they leave out of our work (reading the model, limits, usage, metrics by tenant) they cannot do without modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.programs import Process, program

_NGINX = """\
daemon off;
user {user};
worker_processes 1;
worker_rlimit_nofile {files};
pid {directory}/nginx.pid;
error_log {directory}/nginx-errors.log error;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    map_hash_max_size 8192;
    map_hash_bucket_size 128;
    map $http_authorization $is_known {{
        default 0;
{keys}
    }}
    upstream vllm {{
        least_conn;
{servers}
        keepalive 2048;
        keepalive_requests 1000000000;
        keepalive_timeout 4s;  # vLLM closes after 5
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        keepalive_requests 1000000000;
        keepalive_timeout 75s;
        tcp_nodelay on;
        client_max_body_size 32m;
        location / {{
            if ($is_known = 0) {{ return 401; }}
            proxy_pass http://vllm;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Authorization "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""

_HAPROXY = """\
global
    nbthread 1
    maxconn {connections}
    tune.bufsize 16384
defaults
    mode http
    timeout connect 2s
    timeout client 600s
    timeout server 600s
    timeout http-keep-alive 75s
    option http-no-delay
    http-reuse always
    retry-on conn-failure empty-response
frontend clients
    bind 127.0.0.1:{port} backlog 4096
    acl is_known req.hdr(authorization),word(2,\\ ),map_str({directory}/haproxy-keys.map,0) -m str 1
    http-request deny deny_status 401 unless is_known
    http-request del-header authorization
    default_backend vllm
backend vllm
    balance leastconn
{servers}
"""


def nginx(directory: Path, port: int, upstream_ports: Sequence[int], keys: Sequence[str], core: int | None) -> Process:
    configuration = directory / "nginx.conf"
    configuration.write_text(
        _NGINX.format(
            user=directory.owner(),
            directory=directory,
            port=port,
            files=16_000,
            connections=8000,
            keys="\n".join(f'        "Bearer {key}" 1;' for key in keys),
            servers="\n".join(f"        server 127.0.0.1:{upstream};" for upstream in upstream_ports),
        )
    )
    command = [program("nginx"), "-e", str(directory / "nginx-errors.log"), "-c", str(configuration)]
    process = Process(command, directory / "nginx.log", core=core)
    process.wait_listening(port)
    return process


def haproxy(
    directory: Path, port: int, upstream_ports: Sequence[int], keys: Sequence[str], core: int | None
) -> Process:
    (directory / "haproxy-keys.map").write_text("".join(f"{key} 1\n" for key in keys))
    configuration = directory / "haproxy.cfg"
    configuration.write_text(
        _HAPROXY.format(
            directory=directory,
            port=port,
            connections=8000,
            servers="\n".join(f"    server {n} 127.0.0.1:{upstream}" for n, upstream in enumerate(upstream_ports)),
        )
    )
    process = Process([program("haproxy"), "-db", "-f", str(configuration)], directory / "haproxy.log", core=core)
    process.wait_listening(port)
    return process
