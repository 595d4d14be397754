# One image for every part: gateway, workers, migrations and Flower differ by their command only.
#
#   LOCK               which lock: cpu, or cuda for the workers of NVIDIA GPUs
#   EXTRA_INDEX_URL    an index with torch's CPU wheels; without one, torch brings its CUDA libraries along
FROM python:3.11-slim

ARG LOCK=cpu
ARG EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /srv
COPY requirements/${LOCK}.lock requirements.lock
RUN pip install ${EXTRA_INDEX_URL:+--extra-index-url "$EXTRA_INDEX_URL"} --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY device_operations device_operations
COPY tasks tasks
COPY workers workers
COPY api_gateway api_gateway
COPY migrations migrations
RUN pip install --no-deps --editable . \
    && useradd --create-home --uid 1000 service \
    && install -d -m 700 -o service -g service /data \
    && install -d -o service -g service /models
USER service
ENTRYPOINT ["device-operations"]
CMD ["--help"]
