"""HAProxy, nginx and Envoy, set up to do what Duet does by default: one worker, routing by host and path, connect and
request timeouts, two retries of what was not processed, metrics on, and in two-hop rows mTLS with the other's name checked."""

import json
import os

from . import certs
from .procs import Process, free_port

_HAPROXY = """global
  nbthread 1
  maxconn 4000
  tune.ssl.default-dh-param 2048
defaults
  mode http
  timeout connect 1s
  timeout client 60s
  timeout server 10s
  timeout http-request 60s
  retries 2
  retry-on conn-failure
  option redispatch
  http-reuse always
  {log}
frontend metrics
  bind 127.0.0.1:{metrics}
  http-request use-service prometheus-exporter if {{ path /metrics }}
frontend in
  bind 127.0.0.1:{port}{bind}
  {rules}
  http-request return status 404 unless {{ hdr(host) -m beg -i {host} }}
  {choice}
backend service
  balance random(2)
  {servers}
"""

_NGINX = """daemon off;
worker_processes 1;
error_log {folder}/error.log;
pid {folder}/pid;
events {{ worker_connections 8000; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server_tokens off;
  {http}
}}
"""


class Place:
    """Where one peer runs: a folder of its own, a processor, and the certificates."""

    def __init__(self, folder, cpu, certificates, envoy):
        self.folder, self.cpu, self.certificates, self.envoy = folder, cpu, certificates, envoy

    def file(self, name, text):
        """Writes a configuration file."""
        path = f"{self.folder}/{name}"
        with open(path, "w") as file:
            file.write(text)
        return path


def _addresses(count):
    """Of loopback, for many endpoints."""
    return [f"127.0.{1 + at // 250}.{1 + at % 250}" for at in range(count)]


def haproxy(place, to, http2=False, tls=None, log=False, many=None, host="echo"):
    """One HAProxy. `tls`: None, `out` (encrypts) or `in` (decrypts, checks the client); both speak HTTP/2 between.
    `many`: ("routes" or "endpoints", how many)."""
    port, folder = free_port(), place.certificates
    bind, server, rules = "", "", ""
    if http2:
        bind = server = " proto h2"
    if tls == "in":
        bind = f" ssl crt {folder}/server.both ca-file {folder}/ca.pem verify required alpn h2 ssl-min-ver TLSv1.3"
        rules = ("http-request deny unless { ssl_c_s_dn(cn) client }\n"
                 "  http-request set-header x-forwarded-client-cert %[ssl_c_s_dn]")
    elif tls == "out":
        server = (f" ssl crt {folder}/client.both ca-file {folder}/ca.pem verify required verifyhost server"
                  " alpn h2 ssl-min-ver TLSv1.3 sni str(server)")
    kind, count = many or ("", 1)
    choice = "use_backend service if { path_beg / }"
    if kind == "routes":
        choice = "\n  ".join(f"use_backend service if {{ path_beg /route-{at}/ }}" for at in range(count))
    addresses = _addresses(count) if kind == "endpoints" else ["127.0.0.1"]
    servers = "\n  ".join(f"server s{at} {address}:{to}{server}" for at, address in enumerate(addresses))
    text = _HAPROXY.format(port=port, metrics=free_port(), bind=bind, rules=rules, host=host, choice=choice,
                           servers=servers, log="log stdout format raw local0\n  option httplog" if log else "")
    name = f"haproxy-{port}"
    process = Process(name, ["haproxy", "-f", place.file(f"{name}.cfg", text), "-db"], place.cpu,
                      f"{place.folder}/{name}.log")
    return process.ready(port), port


def nginx(place, to, tls=None):
    """One nginx, HTTP/1.1; `tls` as for HAProxy."""
    port, folder, scheme, more, listen = free_port(), place.certificates, "http", "", ""
    if tls == "in":
        listen = " ssl"
        more = (f"ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key; ssl_protocols TLSv1.3;"
                f" ssl_client_certificate {folder}/ca.pem; ssl_verify_client on;"
                ' if ($ssl_client_s_dn !~ "CN=client") { return 403; }')
    elif tls == "out":
        scheme = "https"
        more = (f"proxy_ssl_certificate {folder}/client.pem; proxy_ssl_certificate_key {folder}/client.key;"
                f" proxy_ssl_trusted_certificate {folder}/ca.pem; proxy_ssl_verify on; proxy_ssl_name server;"
                " proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;")
    http = f"""map $http_upgrade $upgrading {{ default upgrade; "" ""; }}
  upstream service {{ server 127.0.0.1:{to}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port}{listen};
    keepalive_requests 100000000;
    {more}
    location / {{
      proxy_pass {scheme}://service;
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $upgrading;
      proxy_set_header Host $host;
      proxy_connect_timeout 1s;
      proxy_read_timeout 10s;
      proxy_next_upstream error timeout;
      proxy_next_upstream_tries 3;
    }}
    location = /nginx_status {{ stub_status; }}
  }}"""
    name = f"nginx-{port}"
    text = _NGINX.format(folder=place.folder, http=http)
    process = Process(name, ["nginx", "-c", place.file(f"{name}.conf", text)], place.cpu,
                      f"{place.folder}/{name}.log")
    return process.ready(port), port


def backend(place, body=100):
    """nginx as the application: a fixed body over HTTP/1.1 and, on a second port, HTTP/2."""
    http1, http2 = free_port(), free_port()
    servers = [f"""server {{
    listen 0.0.0.0:{port}{flag} backlog=4096;
    keepalive_requests 100000000;
    http2_max_requests 100000000;
    location / {{ return 200 "{'x' * 100}"; }}
    location /file/ {{ alias {place.folder}/files/; }}
  }}""" for port, flag in ((http1, ""), (http2, " http2"))]
    os.makedirs(f"{place.folder}/files", exist_ok=True)
    for size in (100, 10_240, 1_048_576):
        with open(f"{place.folder}/files/{size}", "w") as file:
            file.write("x" * size)
    http = "sendfile on; tcp_nopush on; open_file_cache max=100; http2_max_concurrent_streams 4096;\n  " + "\n  ".join(servers)
    path = place.file("backend.conf", "user root;\n" + _NGINX.format(folder=place.folder, http=http))
    process = Process("backend", ["nginx", "-c", path], place.cpu, f"{place.folder}/backend.log")
    return process.ready(http1).ready(http2), http1, http2


def _tls_context(place, side):
    other = "client" if side == "server" else "server"
    name = {"san_type": "URI", "matcher": {"exact": certs.spiffe(other)}}
    folder = place.certificates
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": f"{folder}/{side}.pem"},
                              "private_key": {"filename": f"{folder}/{side}.key"}}],
        "validation_context": {"trusted_ca": {"filename": f"{folder}/ca.pem"},
                               "match_typed_subject_alt_names": [name]},
        "alpn_protocols": ["h2"]}
    prefix = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
    if side == "server":
        return {"name": "tls", "typed_config": {"@type": prefix + "DownstreamTlsContext", "common_tls_context": common,
                                                "require_client_certificate": True}}
    return {"name": "tls", "typed_config": {"@type": prefix + "UpstreamTlsContext", "common_tls_context": common,
                                            "sni": "server"}}


def envoy(place, to, http2=False, tls=None, many=None, host="echo"):
    """One Envoy; `tls` and `many` as for HAProxy."""
    port, admin = free_port(), free_port()
    extensions = "type.googleapis.com/envoy.extensions."
    kind, count = many or ("", 1)
    action = {"cluster": "service", "timeout": "10s",
              "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 2}}
    prefixes = [f"/route-{at}/" for at in range(count)] if kind == "routes" else ["/"]
    matches = [{"match": {"prefix": prefix}, "route": action} for prefix in prefixes]
    addresses = _addresses(count) if kind == "endpoints" else ["127.0.0.1"]
    manager = {
        "@type": extensions + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in", "codec_type": "AUTO", "generate_request_id": False,
        "forward_client_cert_details": "SANITIZE_SET" if tls == "in" else "SANITIZE",
        "set_current_client_cert_details": {"uri": True},
        "route_config": {"virtual_hosts": [{"name": "service", "domains": [f"{host}*"], "routes": matches}]},
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "http_filters": [{"name": "router", "typed_config": {
            "@type": extensions + "filters.http.router.v3.Router"}}]}
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    cluster = {
        "name": "service", "connect_timeout": "1s", "type": "STATIC", "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": "service", "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": {"socket_address": {"address": one, "port_value": to}}}} for one in addresses]}]},
        "circuit_breakers": {"thresholds": [{"max_connections": 20000, "max_requests": 20000,
                                             "max_pending_requests": 20000}]}}
    if http2 or tls == "out":
        cluster["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": extensions + "upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}}}}
    if tls == "out":
        cluster["transport_socket"] = _tls_context(place, "client")
    if tls == "in":
        chain["transport_socket"] = _tls_context(place, "server")
    def address(number):
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}
    config = {"static_resources": {"listeners": [{"name": "in", "address": address(port), "filter_chains": [chain]}],
                                   "clusters": [cluster]},
              "admin": {"address": address(admin)}}
    name = f"envoy-{port}"
    process = Process(name, [place.envoy, "-c", place.file(f"{name}.json", json.dumps(config)), "--concurrency", "1",
                             "--disable-hot-restart", "-l", "error"], place.cpu, f"{place.folder}/{name}.log")
    return process.ready(port), port
