"""Load generators: wrk and h2load for saturation, oha for a fixed rate that does not wait for answers."""

import json
import re
import subprocess
import sys

from .procs import Failed


def _run(command, cpu, seconds):
    done = subprocess.run(["taskset", "-c", str(cpu), *command], capture_output=True, text=True,
                          timeout=seconds + 60)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: {done.stdout[-300:]}{done.stderr[:500]}")
    return done.stdout


def wrk(url, seconds, cpu, connections=64, headers=()):
    """HTTP/1.1, each connection asks again as soon as it has its answer."""
    extra = [part for header in headers for part in ("-H", header)]
    text = _run(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *extra, url], cpu, seconds)
    requests = int(re.search(r"(\d+) requests in", text).group(1))
    wrong = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = int(wrong.group(1)) if wrong else 0
    failed += sum(int(count) for count in broken.groups()) if broken else 0
    return {"requests": requests, "failed": failed, "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))}


def h2load(port, host, path, seconds, cpu, clients, streams, headers=(), data=None, http1=False, rate=None,
           requests=None):
    """HTTP/2 by prior knowledge (or HTTP/1.1): `clients` connections with `streams` requests in flight each, for some
    time or, if given, for a number of `requests`."""
    extra = [part for header in headers for part in ("-H", header)]
    extra += ["-d", data] if data else []
    extra += ["--h1"] if http1 else []
    extra += ["--rps", str(rate / clients)] if rate else []
    bound = ["-n", str(requests)] if requests else ["-D", str(seconds)]
    command = ["h2load", "-t1", f"-c{clients}", f"-m{streams}", *bound, f"--connect-to=127.0.0.1:{port}",
               *extra, f"http://{host}:80{path}"]
    text = _run(command, cpu, seconds)
    counts = re.search(r"requests: (\d+) total, .*? (\d+) succeeded, (\d+) failed", text)
    status = int(re.search(r"status codes: (\d+) 2xx", text).group(1))
    succeeded = int(counts.group(2))
    rate = float(re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", text).group(1))
    return {"requests": succeeded, "failed": int(counts.group(3)) + max(0, succeeded - status), "rate": rate}


def oha(program, port, host, seconds, cpu, rate):
    """A fixed rate; latency counts from when a request should have been sent. Seconds."""
    command = [program, "--no-tui", "--output-format", "json", "-z", f"{seconds}s", "-q", str(rate), "-c", "16",
               "--latency-correction", "--connect-to", f"{host}:80:127.0.0.1:{port}", f"http://{host}:80/"]
    report = json.loads(_run(command, cpu, seconds))
    codes = report["statusCodeDistribution"]
    wrong = sum(count for code, count in codes.items() if not code.startswith("2"))
    latency = report["latencyPercentiles"]
    return {"requests": sum(codes.values()), "failed": wrong,
            **{name: latency[name] for name in ("p50", "p99", "p99.9")}}


def tunnel(program, port, host, seconds, cpu):
    """Bytes through upgraded connections; a "request" is a MiB that came back."""
    text = _run([program, "tunnel", f"127.0.0.1:{port}", "--host", host, "--seconds", str(seconds)], cpu, seconds)
    report = json.loads(text)
    mib = report["bytes"] / 2**20
    return {"requests": mib, "failed": 0, "rate": mib / report["seconds"]}


_HANDSHAKES = """
import json, socket, ssl, sys, time
port, certificate, ca, name, alpn, seconds = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.load_cert_chain(certificate)
context.set_alpn_protocols([alpn])
count, failed, end = 0, 0, time.monotonic() + float(seconds)
while time.monotonic() < end:
    try:
        with socket.create_connection(("127.0.0.1", int(port))) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with context.wrap_socket(plain, server_hostname=name) as secure:
                # The server has taken the certificate when it answers: HTTP/2 settings, or a 400.
                secure.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0" if alpn == "h2"
                               else b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
                failed += not secure.recv(1)
        count += 1
    except OSError:
        failed += 1
print(json.dumps({"requests": count, "failed": failed}))
"""


def handshakes(port, tls, seconds, cpu):
    """Connects, handshakes with a client certificate, and leaves, again and again."""
    report = json.loads(_run([sys.executable, "-c", _HANDSHAKES, str(port), *tls, str(seconds)], cpu, seconds))
    return {**report, "rate": report["requests"] / seconds}
