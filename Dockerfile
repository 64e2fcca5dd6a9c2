# Three images: `servers` (MLflow and the migrations, no torch), `sweeper` (what trains), and `nightly`,
# which is `sweeper` under supercronic.
#   docker build --target sweeper --tag sweeper:0.1.0 .
#   docker build --target sweeper --tag sweeper:0.1.0 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    TZ=UTC
# not root: whatever a model or a data file does, it does it as nobody in particular
RUN useradd --create-home --uid 10001 sweeper \
 && mkdir /artifacts \
 && chown sweeper:sweeper /artifacts
WORKDIR /home/sweeper
COPY constraints.txt ./

# built from source: Go checks it against the public checksum database, on every architecture
FROM golang:1.24.4-bookworm AS supercronic
RUN CGO_ENABLED=0 GOBIN=/out go install github.com/aptible/supercronic@v0.2.32

FROM base AS servers
RUN pip install --constraint constraints.txt mlflow optuna "psycopg[binary]"
COPY deploy/init_databases.py deploy/check_mlflow.py deploy/
USER sweeper

FROM base AS sweeper
# CPU by default: small, and it runs everywhere; a CUDA index makes the GPU image
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt --index-url "${TORCH_INDEX}" torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY sweeper sweeper
COPY hydra_plugins hydra_plugins
COPY conf conf
RUN pip install --constraint constraints.txt ".[postgres,ray,nightly]" \
 && rm -rf sweeper hydra_plugins conf \
 && mkdir -p outputs .cache/huggingface \
 && chown -R sweeper:sweeper .
USER sweeper
ENTRYPOINT ["python", "-m", "sweeper"]

FROM sweeper AS nightly
COPY --from=supercronic /out/supercronic /usr/local/bin/supercronic
COPY deploy/nightly.crontab ./
USER sweeper
ENTRYPOINT ["supercronic", "-passthrough-logs", "nightly.crontab"]
