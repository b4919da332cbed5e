#!/usr/bin/env bash
# Prints one Secret for each of the shop's service accounts, with a join token in it:
#
#     scripts/k8s-shop-tokens.sh | kubectl apply -f -
#
# Tokens are made by the control plane that runs in the cluster. DUET is the command that reaches it and
# DUET_STATE its state folder there; set both to make tokens elsewhere, as the tests do without a cluster.
# LIFETIME is how long pods that start anew can join with these tokens; pods that have joined renew their
# certificates without one.
set -euo pipefail

case "${1:-}" in
"") ;;
-h | --help)
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
  ;;
*)
  echo "$0: unexpected argument $1; see $0 --help" >&2
  exit 2
  ;;
esac

read -r -a duet <<<"${DUET:-kubectl --namespace=duet-system exec statefulset/duet-control-plane -- duet}"
state=${DUET_STATE:-/var/lib/duet}
lifetime=${LIFETIME:-30d}
namespace=shop
service_accounts=(storefront orders inventory payments notifications shopper)

for account in "${service_accounts[@]}"; do
  # Standard input stays closed, so that a command that reads it cannot eat this script's.
  token=$("${duet[@]}" token create --state "$state" --namespace "$namespace" \
    --service-account "$account" --lifetime "$lifetime" </dev/null)
  # A token goes into YAML as it is: anything but one line of harmless characters is an error message.
  if [[ ! $token =~ ^[A-Za-z0-9._:/+=-]+$ ]]; then
    echo "$0: ${duet[*]} token create gave no token for $account, but: ${token:0:200}" >&2
    exit 1
  fi
  cat <<YAML
---
apiVersion: v1
kind: Secret
metadata:
  name: duet-token-$account
  namespace: $namespace
  labels: {app.kubernetes.io/name: $account, app.kubernetes.io/part-of: shop}
type: Opaque
stringData:
  token: $token
YAML
done
