# The control plane, the proxy and the command line in one image: `docker build --tag controlplane:0.1.0 .`
#
# Every library is pinned by version and hash in requirements-run.lock. The base is pinned by version; to pin it by
# content as well, build with --build-arg PYTHON=3.11.14-slim-bookworm@sha256:... of what your registry has checked.
# Debian 12 and its Python are what the tests run on.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY requirements-run.lock requirements-build.lock ./
RUN python -m pip install --require-hashes --only-binary :all: -r requirements-build.lock
RUN python -m venv --without-pip /opt/controlplane
RUN python -m pip --python /opt/controlplane/bin/python install --require-hashes --only-binary :all: \
    -r requirements-run.lock
COPY pyproject.toml README.md LICENSE ./
COPY controlplane controlplane
COPY sbatch sbatch
COPY grafana grafana
COPY loki loki
COPY prometheus prometheus
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .
RUN python -m pip --python /opt/controlplane/bin/python install --no-deps --no-index --find-links /wheels controlplane

# No compiler, no build tools, no cache; nothing is written but below /tmp, so that the root may be read-only.
FROM python:${PYTHON}
LABEL org.opencontainers.image.title="controlplane" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/controlplane /opt/controlplane
ENV PATH=/opt/controlplane/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 9100
# SIGTERM ends it well. Whether it is healthy is asked by who runs it: /health and /ready on both ports.
ENTRYPOINT ["controlplane"]
CMD ["serve"]
