"""Exit 0 if an MLflow server answers a real request under each of the names its clients use.

/health alone answers 200 even where every other request is refused for its Host header.

    python deploy/check_mlflow.py http://127.0.0.1:5000 mlflow:5000 localhost:5000
"""

from __future__ import annotations

import sys
import urllib.request

TIMEOUT_S = 5


def main() -> None:
    """Ask for one experiment, as each of the given hosts."""
    address, *hosts = sys.argv[1:]
    for host in hosts or [address.partition("//")[2]]:
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host}
        )
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_S).read()
        except OSError as error:
            sys.exit(f"{address} as {host}: {error}")


if __name__ == "__main__":
    main()
