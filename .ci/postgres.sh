#!/usr/bin/env bash
# A throw-away PostgreSQL 15 with PostGIS on loopback, for the tests against stac-fastapi-pgstac.
#
#   .ci/postgres.sh start ENV_FILE   install (as root, Debian) where absent, start, write what to `source`; leaves it running
#   .ci/postgres.sh stop             stop it and delete its data
#
# May be called again at any time: what is there already is kept. ENV_FILE exports CLOUDGATE_PGSTAC_DSN, without which
# the tests skip and say so.
set -euo pipefail

command=${1:?usage: .ci/postgres.sh start ENV_FILE | stop}
port=${CLOUDGATE_PG_PORT:-5499}
bin=/usr/lib/postgresql/15/bin
postgis=/usr/share/postgresql/15/extension/postgis.control
data=${TMPDIR:-/tmp}/cloudgate-postgres-$port

# The server refuses to run as root.
as_postgres() {
    if [ "$(id -u)" = 0 ]; then (cd / && runuser -u postgres -- "$@"); else "$@"; fi
}

install_packages() {
    [ -x "$bin/initdb" ] && [ -f "$postgis" ] && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "postgres.sh: PostgreSQL 15 with PostGIS is absent and only root on Debian can install it here" >&2
        exit 3
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends postgresql-15 postgresql-15-postgis-3 >/dev/null
}

start() {
    env_file=${1:?usage: .ci/postgres.sh start ENV_FILE}
    install_packages
    if ! "$bin/pg_isready" -q -h 127.0.0.1 -p "$port"; then
        if [ ! -f "$data/PG_VERSION" ]; then
            rm -rf "$data" && mkdir -p "$data"
            if [ "$(id -u)" = 0 ]; then chown postgres "$data"; fi
            chmod 700 "$data"
            as_postgres "$bin/initdb" -D "$data" -A trust -U postgres --no-sync >/dev/null
        fi
        # Nothing of it is to survive, so it need not wait for the disk.
        as_postgres "$bin/pg_ctl" -D "$data" -l "$data/log" -w start >/dev/null -o \
            "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories=$data -c fsync=off -c synchronous_commit=off"
    fi
    echo "export CLOUDGATE_PGSTAC_DSN=postgresql://postgres:x@127.0.0.1:$port/postgres" >"$env_file"
    echo "postgres.sh: PostgreSQL answers on 127.0.0.1:$port"
}

stop() {
    if [ -f "$data/postmaster.pid" ]; then as_postgres "$bin/pg_ctl" -D "$data" -m fast -w stop >/dev/null; fi
    rm -rf "$data"
}

case $command in
start) start "${2:-}" ;;
stop) stop ;;
*) echo "usage: .ci/postgres.sh start ENV_FILE | stop" >&2; exit 2 ;;
esac
