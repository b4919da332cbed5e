"""What is compared: for each row, the same load through each peer and through Duet."""

import os
import subprocess
from dataclasses import dataclass

from . import load, peers
from .duet import endpoints, policy, routes, service

HOST = "echo.default"


@dataclass
class Side:
    """One of the compared: its processes, and where the load goes."""
    name: str
    processes: list
    port: int
    tls: tuple = ()


@dataclass
class Row:
    """A row: who takes part (`start`), how it is loaded (`drive`), what is counted (`unit`, `per` of them for each
    request), and what is measured besides cost at saturation."""
    name: str
    title: str
    drive: object
    start: object
    unit: str = "request"
    per: int = 1
    latency: bool = False
    memory: bool = False


def http1(path="/", connections=64, rate=None):
    """HTTP/1.1 by wrk, or at a fixed rate by h2load."""
    def drive(bench, side, seconds):
        if rate:
            return load.h2load(side.port, HOST, path, seconds, bench.load_cpu, connections, 1, http1=True, rate=rate)
        return load.wrk(f"http://127.0.0.1:{side.port}{path}", seconds, bench.load_cpu, connections, [f"Host: {HOST}"])
    return drive


def http2(path="/", clients=8, streams=8, grpc=False):
    """HTTP/2 by h2load; gRPC is a POST of one framed message."""
    def drive(bench, side, seconds):
        headers, data = (), None
        if grpc:
            headers = ("content-type: application/grpc", "te: trailers")
            data = f"{bench.folder}/message"
            with open(data, "wb") as file:
                file.write(bytes([0, 0, 0, 0, 100]) + b"x" * 100)
        return load.h2load(side.port, HOST, path, seconds, bench.load_cpu, clients, streams, headers, data)
    return drive


def handshakes(bench, side, seconds):
    """Full TLS 1.3 handshakes, one after the other, with a client certificate."""
    return load.handshakes(side.port, side.tls, seconds, bench.load_cpu)


def tunnel(bench, side, seconds):
    """Bytes both ways through upgraded connections."""
    return load.tunnel(bench.options.peer, side.port, HOST, seconds, bench.load_cpu)


def one_hop(bench, http2=False, to=None, log=False, many=None):
    """Every peer between the load and the backend, in plaintext. `many`: ("routes" or "endpoints", how many)."""
    place, backend = bench.place, to or (bench.http2 if http2 else bench.http1)
    if "direct" in bench.peers and not many and not log:
        yield Side("direct", [], backend)
    if "haproxy" in bench.peers:
        process, port = peers.haproxy(place, backend, http2, log=log, many=many)
        yield Side("haproxy", [process], port)
    if "nginx" in bench.peers and not http2 and not log and not many:
        process, port = peers.nginx(place, backend)
        yield Side("nginx", [process], port)
    if "envoy" in bench.peers and not log:
        process, port = peers.envoy(place, backend, http2, many=many)
        yield Side("envoy", [process], port)
    for name in bench.duets:
        yield duet_one_hop(bench, name, http2, backend, many, log=f"{bench.folder}/access.log" if log else "off")


def duet_one_hop(bench, name, http2, backend, many=None, **options):
    """One sidecar; the application behind it is an endpoint without a sidecar."""
    mesh = bench.mesh(name)
    kind, count = many or ("", 1)
    addresses = [f"127.0.{1 + at // 250}.{1 + at % 250}" for at in range(count)] if kind == "endpoints" else ["127.0.0.1"]
    yaml = service("echo", 80, "h2" if http2 else "http", backend) + endpoints("echo", backend, addresses)
    mesh.write("echo", yaml + policy("echo") + (routes("echo", count) if kind == "routes" else ""))
    process, ports = mesh.sidecar("client", **options)
    return Side(name, [process], ports["outbound"])


def two_hops(bench, to=None, inner_only=False):
    """Every peer twice, with mTLS between; HTTP/1.1 outside, HTTP/2 between (nginx: HTTP/1.1)."""
    place, backend, folder = bench.place, to or bench.http1, bench.place.certificates
    tls = (f"{folder}/client.both", f"{folder}/ca.pem", "server", "h2")
    if "direct" in bench.peers and not inner_only:
        yield Side("direct", [], backend)
    for name in ("haproxy", "nginx", "envoy"):
        if name in bench.peers:
            start = getattr(peers, name)
            inner, inner_port = start(place, backend, tls="in")
            if inner_only:
                yield Side(name, [inner], inner_port, (*tls[:3], "http/1.1") if name == "nginx" else tls)
                continue
            outer, port = start(place, inner_port, tls="out")
            yield Side(name, [outer, inner], port)
    for name in bench.duets:
        yield duet_two_hops(bench, name, backend, inner_only)


def duet_two_hops(bench, name, backend, inner_only=False, **options):
    """Two sidecars."""
    mesh = bench.mesh(name)
    mesh.write("echo", service("echo", 80, "http", backend) + policy("echo"))
    inner, inner_ports = mesh.sidecar("echo", app_port=backend, **options)
    outer, ports = mesh.sidecar("client", **options)
    if inner_only:
        state = f"{mesh.folder}/sidecars/client"
        tls = (f"{state}/svid.pem", f"{state}/trust-bundle.pem", f"port-{backend}.duet.internal", "h2")
        return Side(name, [inner], inner_ports["inbound"], tls)
    return Side(name, [outer, inner], ports["outbound"])


def workers(bench):
    """The same load through one and through two workers, on both processors."""
    for name in bench.duets:
        for count in (1, 2):
            side = duet_one_hop(bench, name, False, bench.http1, workers=count, cpu="0,1")
            side.name = f"{name}, {count} worker{'s' if count > 1 else ''}"
            yield side


def _peer(start):
    """Only where the application of bench/src is built."""
    def started(bench):
        if not (bench.options.peer and os.path.exists(bench.options.peer)):
            print("LEFT OUT: bench-peer is not built", flush=True)
            return []
        return start(bench, bench.app())
    return started


ROWS = [
    Row("http1", "HTTP/1.1, one hop, plaintext", http1(), one_hop, latency=True, memory=True),
    Row("http2", "HTTP/2, one hop, plaintext, 8 x 8 streams", http2(), lambda bench: one_hop(bench, True)),
    Row("grpc", "gRPC unary, one hop, plaintext, 8 x 8 streams", http2("/bench.Bench/Unary", grpc=True),
        _peer(lambda bench, app: one_hop(bench, True, app))),
    Row("grpc-stream", "gRPC server streaming, 100 messages a call, one hop", http2("/bench.Bench/Stream", 8, 2, True),
        _peer(lambda bench, app: one_hop(bench, True, app)), unit="message", per=100),
    Row("mtls", "HTTP/1.1, two hops, mTLS between", http1(), two_hops, latency=True),
    Row("10k", "HTTP/1.1, one hop, 10 KiB bodies", http1("/file/10240"), one_hop),
    Row("1m", "HTTP/1.1, one hop, 1 MiB bodies", http1("/file/1048576", 16), one_hop),
    Row("mtls-10k", "HTTP/1.1, two hops, mTLS, 10 KiB bodies", http1("/file/10240"), two_hops),
    Row("mtls-1m", "HTTP/1.1, two hops, mTLS, 1 MiB bodies", http1("/file/1048576", 16), two_hops),
    Row("routes", "HTTP/1.1, one hop, the last of 1,000 routes", http1("/route-999/x"),
        lambda bench: one_hop(bench, many=("routes", 1000))),
    Row("endpoints", "HTTP/1.1, one hop, 1,000 endpoints", http1(), lambda bench: one_hop(bench, many=("endpoints", 1000))),
    Row("churn", "mTLS handshakes", handshakes, lambda bench: two_hops(bench, inner_only=True), unit="handshake"),
    Row("log", "HTTP/1.1, one hop, access log to a file", http1(), lambda bench: one_hop(bench, log=True)),
    Row("workers", "HTTP/1.1, one hop, 8,000/s through 1 and 2 workers", http1(rate=8000), workers),
    Row("tunnel", "WebSocket, one hop, 4 connections", tunnel, _peer(lambda bench, app: one_hop(bench, False, app)),
        unit="MiB"),
]


def build(repository):
    """The binaries of this work tree."""
    # The sidecar by itself: built together, it would get what others ask of libraries that it shares with them.
    for packages in (["duet-proxy"], ["duet", "duet-bench"]):
        named = [part for package in packages for part in ("-p", package)]
        subprocess.run(["cargo", "build", "--release", "--locked", "--bins", *named], check=True, cwd=repository)
