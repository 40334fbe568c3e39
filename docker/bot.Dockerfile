# The Discord and Telegram adapters: no torch, no weights. From the repository's root:
#   docker build -f docker/bot.Dockerfile -t guppy-bot .
# One image for both. Name the base by digest to have the very same one each time: --build-arg PYTHON=python@sha256:...
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS made
COPY docker/locks/bot.lock /tmp/locks/
RUN python -m venv --without-pip /opt/guppy \
 && pip --python /opt/guppy/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r /tmp/locks/bot.lock
# Readable whatever the checkout's modes are, and compiled here because the image is run read-only.
COPY docker/run-role.sh /app/
COPY bot /app/bot
RUN chmod -R a+rX /app && python -m compileall -q /app

FROM ${PYTHON}
ARG VERSION=unreleased
ARG REVISION=unknown
LABEL org.opencontainers.image.title="guppy-bot" \
      org.opencontainers.image.description="Guppy's adapters for Discord and Telegram" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=made /opt/guppy /opt/guppy
COPY --from=made /app /app
WORKDIR /app
ENV PATH=/opt/guppy/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
# Both adapters, as far as there are tokens; compose starts each alone.
CMD ["/app/run-role.sh", "all"]
