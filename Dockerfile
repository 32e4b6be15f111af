# The server writes to /data (the base model, adapters, keys, caches) and /tmp, and nowhere else:
#
#   docker build -t polypeft --build-arg VARIANT=cpu --build-arg TORCH_INDEX_URL=... .
#   docker run --read-only --tmpfs /tmp -v polypeft:/data -p 8000:8000 polypeft
#
# VARIANT  cpu (a much smaller image; needs PyTorch's index of CPU wheels as TORCH_INDEX_URL), or cuda (from the
#          default index, with a C compiler for Triton). The build fails if torch is of the other variant.
# BASE     pinned by tag. For a reproducible build give it by digest: python@sha256:...
#
# Debian 12 and Python 3.11 are what the tests run on. deploy/check-image builds and runs this file without Docker.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG VARIANT=cuda
ARG TORCH_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /venv
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch alone from the index given, so that no other package can come from there
RUN torch=$(python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"][0])') \
    && if [ -n "${TORCH_INDEX_URL}" ]; then \
        /venv/bin/pip install --constraint constraints.txt --no-deps --index-url "${TORCH_INDEX_URL}" "${torch}"; \
    fi
COPY adapters_store adapters_store
COPY server server
RUN /venv/bin/pip install --constraint constraints.txt --only-binary :all: --no-binary polypeft . \
    && /venv/bin/pip check \
    && /venv/bin/python -c "import sys, torch; found = 'cuda' if torch.version.cuda else 'cpu'; \
found == '${VARIANT}' or sys.exit(f'VARIANT=${VARIANT}, but torch {torch.__version__} is built for {found}: see TORCH_INDEX_URL')"

FROM ${BASE}
ARG VARIANT=cuda
# Triton compiles its launchers where it runs. Debian's versions are the base's, whose tag pins them.
# hadolint ignore=DL3008
RUN if [ "${VARIANT}" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --system --uid 10001 --user-group --home-dir /data --create-home --shell /usr/sbin/nologin polypeft
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    POLYPEFT_HOST=0.0.0.0 \
    POLYPEFT_DATA_DIR=/data \
    POLYPEFT_LOG_FORMAT=json \
    HF_HOME=/data/cache/huggingface \
    NUMBA_CACHE_DIR=/data/cache/numba \
    TRITON_CACHE_DIR=/data/cache/triton \
    MPLCONFIGDIR=/data/cache/matplotlib
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["polypeft"]
CMD ["serve"]
