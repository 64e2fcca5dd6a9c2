"""Create Optuna's and MLflow's databases where they are missing, and bring their tables up to date.

Both crash when several processes start on an empty database at once; so this runs first, alone, under
PostgreSQL's advisory lock. Running it again changes nothing. URLs come from the environment, because
arguments are seen by every user of the machine.

    SWEEPER_STORAGE=postgresql+psycopg://… MLFLOW_BACKEND_STORE_URI=postgresql+psycopg://… \
        python deploy/init_databases.py
"""

from __future__ import annotations

import os
import sys

import psycopg
from psycopg import sql
from sqlalchemy import make_url

LOCK = 0x5EE9E4
VARIABLES = ("SWEEPER_STORAGE", "MLFLOW_BACKEND_STORE_URI")


def main() -> None:
    """Migrate both databases, one process at a time."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        sys.exit(f"set {' and '.join(missing)} (see .env.example)")
    storage, backend = (os.environ[name] for name in VARIABLES)
    with _server(storage) as connection:
        connection.execute("select pg_advisory_lock(%s)", (LOCK,))
        for url in (storage, backend):
            _create(connection, str(make_url(url).database))
        _migrate_optuna(storage)
        _migrate_mlflow(backend)
    print("both databases are up to date")


def _server(url: str) -> psycopg.Connection:
    parts = make_url(url)
    return psycopg.connect(
        host=parts.host,
        port=parts.port or 5432,
        user=parts.username,
        password=parts.password,
        dbname="postgres",
        autocommit=True,
        connect_timeout=10,
    )


def _create(connection: psycopg.Connection, name: str) -> None:
    found = connection.execute("select 1 from pg_database where datname = %s", (name,)).fetchone()
    if found is None:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))


def _migrate_optuna(url: str) -> None:
    from optuna.storages import RDBStorage

    RDBStorage(url, skip_compatibility_check=True).upgrade()


def _migrate_mlflow(url: str) -> None:
    from mlflow.db import commands  # `mlflow db upgrade URL`, without an argument for `ps` to show

    commands(["upgrade", url], standalone_mode=False)


if __name__ == "__main__":
    main()
