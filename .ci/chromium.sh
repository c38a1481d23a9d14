#!/usr/bin/env bash
# Debian's Chromium for the tests that open the map page in a browser.
#
#   .ci/chromium.sh ENV_FILE   install (as root, Debian) where absent, write what to `source`
#
# ENV_FILE exports CLOUDGATE_CHROMIUM, the program; without it the tests look on PATH, and skip and say so where there is
# none.
set -euo pipefail

env_file=${1:?usage: .ci/chromium.sh ENV_FILE}
found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

if ! found >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "chromium.sh: Chromium is absent and only root on Debian can install it here" >&2
        exit 3
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
fi
echo "export CLOUDGATE_CHROMIUM=$(found)" >"$env_file"
echo "chromium.sh: $(found)"
