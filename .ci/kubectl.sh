#!/usr/bin/env bash
# kubectl for the tests of deploy/kubernetes (its Kustomize builds the manifests; no cluster is asked).
#
#   .ci/kubectl.sh            install (as root, Debian) where absent
#
# Without it those tests skip and say why.
set -euo pipefail
if command -v kubectl; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "kubectl.sh: kubectl is absent and only root on Debian can install it here" >&2
    exit 3
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends kubernetes-client >/dev/null
command -v kubectl
