# The worker: torch and the trained fish, on the CPU or, with --build-arg TORCH=cuda, on an NVIDIA GPU. For x86-64, from
# the repository's root:
#   docker build -f docker/worker.Dockerfile -t guppy-worker .
# Name the base by digest to have the very same one each time: --build-arg PYTHON=python@sha256:...
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS made
ARG TORCH=cpu
COPY docker/locks/worker.lock docker/locks/torch-${TORCH}.lock /tmp/locks/
# torch's headers and tests stay out: 200 MB that only a developer of it needs.
RUN python -m venv --without-pip /opt/guppy \
 && pip --python /opt/guppy/bin/python install --no-cache-dir --no-deps --require-hashes --only-binary :all: \
      -r /tmp/locks/worker.lock \
 && pip --python /opt/guppy/bin/python install --no-cache-dir --no-deps --require-hashes --only-binary :all: \
      -r /tmp/locks/torch-${TORCH}.lock \
 && rm -r /opt/guppy/lib/python3*/site-packages/torch/include \
      /opt/guppy/lib/python3*/site-packages/torch/test \
      /opt/guppy/lib/python3*/site-packages/torch/bin/*test*
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY docker/run-role.sh /app/
COPY guppylm /app/guppylm
COPY bot /app/bot
# The fast arithmetic, for the processors that guppylm/native.py names; on others, torch does it. No compiler at run time.
WORKDIR /app
RUN /opt/guppy/bin/python -m guppylm.native
# Readable whatever the checkout's modes are, and compiled here because the image is run read-only.
RUN chmod -R a+rX /app && python -m compileall -q /app \
 && printf '#!/opt/guppy/bin/python\nfrom guppylm.cli import app\n\napp()\n' > /opt/guppy/bin/guppy \
 && chmod 755 /opt/guppy/bin/guppy

FROM ${PYTHON}
ARG VERSION=unreleased
ARG REVISION=unknown
LABEL org.opencontainers.image.title="guppy-worker" \
      org.opencontainers.image.description="Guppy himself: a language model of nine million numbers, answering a queue" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=made /opt/guppy /opt/guppy
COPY --from=made /app /app
WORKDIR /app
ENV PATH=/opt/guppy/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
USER 10001:10001
CMD ["/app/run-role.sh", "worker"]
