"""Instructions for one request, counted by callgrind: the same whatever else the machine does, so that a regression
shows where times would not show it. One request after the other on one connection, so that nothing is shared."""

import glob
import os
import socket
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass

from . import load, peers, procs
from .duet import Duet, endpoints, policy, routes, service

HOST = "echo.default"
_CALLGRIND = ["valgrind", "--tool=callgrind", "--quiet"]
# Requests in each count, and counts of which the median is taken: what happens once in a while (timers, the
# discovery stream, a table that grows) then weighs little.
_REQUESTS, _COUNTS = 300, 3


@dataclass
class Case:
    """One count. `counted`: which side of the call; `many`: routes or endpoints."""
    name: str
    http2: bool = False
    mesh: bool = False
    counted: str = "client"
    many: tuple = ()
    path: str = "/"
    warm_up: int = 300


CASES = [
    Case("outbound_http1"),
    Case("outbound_http2", http2=True),
    Case("outbound_mtls", mesh=True),
    Case("inbound_mtls", mesh=True, counted="echo"),
    Case("outbound_http1_1000_routes", many=("routes", 1000), path="/route-999/"),
    # HTTP/2 to the endpoints: each needs one connection only, after which the counts are of requests alone.
    Case("outbound_http2_1000_endpoints", http2=True, many=("endpoints", 1000), warm_up=12_000),
]
# More routes or endpoints must not make a request dearer: case -> the case with one.
RATIOS = {"outbound_http1_1000_routes": "outbound_http1", "outbound_http2_1000_endpoints": "outbound_http2"}


class Counter:
    """Runs the cases in a folder."""

    def __init__(self, programs, folder, duet=None):
        self.programs, self.folder, self.duet = programs, folder, duet
        os.makedirs(f"{folder}/backend", exist_ok=True)
        place = peers.Place(f"{folder}/backend", 0, None, None)
        _, self.http1, self.http2 = peers.backend(place)

    def count(self, case):
        """Instructions for one request."""
        before = procs.running()
        try:
            process, port = self._start(case)
            ask = _Http2(port, case) if case.http2 else _Http1(port, case)
            self._warm_up(ask, case, process)
            counts = []
            for number in range(_COUNTS + 1):
                self._dump(process)
                if number == _COUNTS:
                    break
                ask(_REQUESTS)
            dumps = sorted(glob.glob(f"{self.folder}/{case.name}.out.*"), key=lambda name: int(name.rsplit(".", 1)[1]))
            for dump in dumps[1:]:
                counts.append(_total(dump) / _REQUESTS)
            if len(counts) != _COUNTS:
                raise procs.Failed(f"{case.name}: callgrind wrote {len(dumps)} dumps instead of {_COUNTS + 1}")
            return round(statistics.median(counts))
        finally:
            procs.stop_since(before)

    def run(self, case, requests):
        """Leaves dumps of a start and some requests in the folder."""
        before = procs.running()
        try:
            process, port = self._start(case)
            ask = _Http2(port, case) if case.http2 else _Http1(port, case)
            ask(requests)
            self._dump(process)
        finally:
            procs.stop_since(before)

    def idle_kib(self):
        """Resident memory of a sidecar that has an upstream and nothing to do."""
        before = procs.running()
        try:
            mesh = Duet(self.programs, tempfile.mkdtemp(dir=self.folder), 0, 0, self.duet)
            mesh.write("echo", service("echo", 80, "http", self.http1) + endpoints("echo", self.http1) + policy("echo"))
            process, _ = mesh.sidecar("client")
            time.sleep(1)
            with open(f"/proc/{process.pids()[-1]}/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
        finally:
            procs.stop_since(before)

    def _start(self, case):
        backend = self.http2 if case.http2 else self.http1
        mesh = Duet(self.programs, f"{self.folder}/{case.name}", 0, 0, self.duet)
        kind, number = case.many or ("", 1)
        yaml = service("echo", 80, "h2" if case.http2 else "http", backend) + policy("echo")
        if not case.mesh:
            addresses = [f"127.0.{1 + at // 250}.{1 + at % 250}" for at in range(number)] if kind == "endpoints" else ["127.0.0.1"]
            yaml += endpoints("echo", backend, addresses)
        mesh.write("echo", yaml + (routes("echo", number) if kind == "routes" else ""))
        out = [*_CALLGRIND, f"--callgrind-out-file={self.folder}/{case.name}.out"]
        # A long warm-up goes without counting, which is faster.
        out += ["--instr-atstart=no"] if case.warm_up > 1000 else []
        processes = {}
        if case.mesh:
            wrap = out if case.counted == "echo" else ()
            processes["echo"], _ = mesh.sidecar("echo", app_port=backend, wrap=wrap)
        wrap = out if case.counted == "client" else ()
        processes["client"], ports = mesh.sidecar("client", wrap=wrap)
        return processes[case.counted], ports["outbound"]

    def _warm_up(self, ask, case, process):
        ask(case.warm_up)
        if case.warm_up > 1000:
            self._control(process, "--instr=on")
            ask(_REQUESTS)

    def _dump(self, process):
        self._control(process, "--dump")

    @staticmethod
    def _control(process, command):
        # valgrind replaces itself by its tool, in the process that was started.
        pid = str(process.pids()[-1])
        done = subprocess.run(["callgrind_control", command, pid], capture_output=True, text=True)
        if "OK." not in done.stdout:
            raise procs.Failed(f"callgrind_control {command}: {done.stdout}{done.stderr}")


def _total(dump):
    with open(dump, errors="replace") as file:
        for line in file:
            if line.startswith(("summary:", "totals:")):
                return int(line.split()[1])
    raise procs.Failed(f"{dump}: no total")


class _Http1:
    """Asks on one connection, one after the other."""

    def __init__(self, port, case):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request = f"GET {case.path} HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: count\r\nAccept: */*\r\n\r\n".encode()

    def __call__(self, times):
        for _ in range(times):
            self.socket.sendall(self.request)
            answer = b""
            while b"\r\n\r\n" not in answer or len(answer) < answer.index(b"\r\n\r\n") + 4 + 100:
                piece = self.socket.recv(4096)
                if not piece:
                    raise procs.Failed("the sidecar closed the connection")
                answer += piece
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise procs.Failed(f"not 200: {answer[:300]}")


class _Http2:
    """Asks by h2load, one after the other."""

    def __init__(self, port, case):
        self.port, self.path = port, case.path

    def __call__(self, times):
        done = load.h2load(self.port, HOST, self.path, 0, 0, 1, 1, requests=times)
        if done["requests"] != times or done["failed"]:
            raise procs.Failed(f"h2load: {done}")


def compare(counted, recorded, tolerance):
    """What is wrong with the counts: lines of text."""
    wrong = []
    for name, found in counted.items():
        before = recorded.get(name)
        if before is None:
            wrong.append(f"{name}: {found:,} instructions, and nothing is recorded: bench/instructions --record")
        elif found > before * (1 + tolerance):
            wrong.append(f"{name}: {found:,} instructions a request, {found / before - 1:+.1%} of the recorded {before:,}")
        elif found < before * (1 - tolerance):
            wrong.append(f"{name}: {found:,} instructions a request, {found / before - 1:+.1%} of the recorded {before:,}: "
                         "keep the gain with bench/instructions --record")
    for many, one in RATIOS.items():
        if many in counted and one in counted and counted[many] > counted[one] * 1.05:
            wrong.append(f"{many} is {counted[many] / counted[one]:.3f} of {one}: at most 1.05")
    return wrong
