"""A CA and two workload certificates with SPIFFE ids for the peers, as Duet's own control plane issues them
(P-256, one URI name). The common name repeats the workload's name, for HAProxy and nginx, which cannot compare URI names."""

import os
import subprocess


def _openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make(folder):
    """Writes ca.pem, and for `client` and `server` .pem (certificate) .key and .both; returns the folder."""
    os.makedirs(folder, exist_ok=True)
    ca, key = f"{folder}/ca.pem", f"{folder}/ca.key"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    _openssl("req", "-x509", *curve, "-keyout", key, "-out", ca, "-days", "30", "-subj", "/CN=bench-ca",
             "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    for name in ("client", "server"):
        request, extensions = f"{folder}/{name}.csr", f"{folder}/{name}.ext"
        _openssl("req", "-new", *curve, "-keyout", f"{folder}/{name}.key", "-out", request, "-subj", f"/CN={name}")
        with open(extensions, "w") as file:
            file.write(f"subjectAltName=URI:{spiffe(name)},DNS:{name}\n"
                       "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n")
        _openssl("x509", "-req", "-in", request, "-CA", ca, "-CAkey", key, "-CAcreateserial", "-days", "30",
                 "-out", f"{folder}/{name}.pem", "-extfile", extensions)
        with open(f"{folder}/{name}.both", "w") as both:
            for part in ("pem", "key"):
                both.write(open(f"{folder}/{name}.{part}").read())
    return folder


def spiffe(name):
    """The SPIFFE id of a workload."""
    return f"spiffe://bench.local/ns/default/sa/{name}"
