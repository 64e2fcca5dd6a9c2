#!/usr/bin/env bash
# PostgreSQL and the MLflow server as processes of this machine: docker-compose.yml without Docker.
#   deploy/servers.sh start|stop|restart|status
# Reads .env (or the file named by ENV_FILE); needs initdb and pg_ctl, and pip install '.[postgres]'.
set -euo pipefail

env_file=${ENV_FILE:-.env}
[[ -r $env_file ]] || { echo "$env_file: not there; cp .env.example .env and fill it in" >&2; exit 2; }
set -a
# shellcheck source=/dev/null
. "$env_file"
set +a
: "${POSTGRES_PASSWORD:?set it in $env_file}"
port=${POSTGRES_PORT:-5432}
mlflow_port=${MLFLOW_PORT:-5000}
dir=$(realpath --canonicalize-missing "${SERVERS_DIR:-servers}")
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
url=postgresql+psycopg://sweeper:$POSTGRES_PASSWORD@127.0.0.1:$port
export SWEEPER_STORAGE=$url/optuna MLFLOW_BACKEND_STORE_URI=$url/mlflow
for bin in /usr/lib/postgresql/*/bin; do PATH=$PATH:$bin; done # Debian keeps them apart

# PostgreSQL refuses to run as root
as_owner() {
    if [[ $EUID -eq 0 ]]; then
        setpriv --reuid=postgres --regid=postgres --init-groups --inh-caps=-all "$@"
    else
        "$@"
    fi
}

start_postgres() {
    if [[ ! -d $dir/postgres ]]; then
        mkdir -p "$dir/postgres"
        local password
        password=$(mktemp)
        printf '%s' "$POSTGRES_PASSWORD" >"$password"
        if [[ $EUID -eq 0 ]]; then chown postgres "$dir/postgres" "$password"; fi
        as_owner initdb --pgdata="$dir/postgres" --username=sweeper --pwfile="$password" \
            --auth=scram-sha-256 --encoding=UTF8 --locale=C >"$dir/initdb.log"
        rm -f "$password"
    fi
    as_owner pg_ctl --pgdata="$dir/postgres" --log="$dir/postgres/server.log" --wait --timeout=60 start \
        --options="-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories= -c timezone=UTC" \
        >/dev/null
}

start_mlflow() {
    MLFLOW_SERVER_ALLOWED_HOSTS=127.0.0.1:$mlflow_port,localhost:$mlflow_port \
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
        setsid "$python" -m mlflow server --host=127.0.0.1 --port="$mlflow_port" --workers=1 \
        --serve-artifacts --artifacts-destination="$dir/artifacts" >>"$dir/mlflow.log" 2>&1 </dev/null &
    echo $! >"$dir/mlflow.pid"
    for _ in $(seq 120); do
        if "$python" "$here/check_mlflow.py" "http://127.0.0.1:$mlflow_port" 2>/dev/null; then return; fi
        kill -0 "$(cat "$dir/mlflow.pid")" 2>/dev/null || break
        sleep 1
    done
    echo "the MLflow server does not start; see $dir/mlflow.log" >&2
    exit 1
}

start() {
    mkdir -p "$dir"
    chmod 755 "$dir"
    as_owner pg_ctl --pgdata="$dir/postgres" status >/dev/null 2>&1 || start_postgres
    "$python" "$here/init_databases.py"
    mlflow_runs || start_mlflow
    echo "PostgreSQL at 127.0.0.1:$port, MLflow at http://127.0.0.1:$mlflow_port"
}

stop() {
    if mlflow_runs; then kill -- "-$(cat "$dir/mlflow.pid")"; fi
    rm -f "$dir/mlflow.pid"
    if [[ -d $dir/postgres ]]; then
        as_owner pg_ctl --pgdata="$dir/postgres" --mode=fast --wait stop >/dev/null 2>&1 || true
    fi
}

mlflow_runs() { [[ -r $dir/mlflow.pid ]] && kill -0 "$(cat "$dir/mlflow.pid")" 2>/dev/null; }

status() {
    as_owner pg_ctl --pgdata="$dir/postgres" status | head -n 1
    if mlflow_runs; then echo "mlflow: server is running (PID: $(cat "$dir/mlflow.pid"))"; else echo "mlflow: no server"; fi
}

case ${1:-} in
start) start ;;
stop) stop ;;
restart) stop && start ;;
status) status ;;
*) sed -n '2,4s/^# //p' "$0" >&2; exit 2 ;;
esac
