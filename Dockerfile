# docker build -t polypeft . && docker run -p 8000:8000 -v polypeft:/data polypeft
#
# The base model, adapters, keys and caches lie in /data. On a machine without a GPU, a much smaller image
# comes from PyTorch's index of CPU wheels: docker build --build-arg TORCH_INDEX_URL=... .
FROM python:3.12-slim AS build
ARG TORCH_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# torch alone from the index given, so that no other package can come from there
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        torch=$(python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"][0])') \
        && /venv/bin/pip install --index-url "$TORCH_INDEX_URL" "$torch"; \
    fi
COPY adapters_store adapters_store
COPY server server
RUN /venv/bin/pip install .

FROM python:3.12-slim
RUN useradd --uid 10001 --home-dir /data --create-home polypeft
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    POLYPEFT_HOST=0.0.0.0 \
    POLYPEFT_DATA_DIR=/data \
    HF_HOME=/data/cache/huggingface \
    NUMBA_CACHE_DIR=/data/cache/numba
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["polypeft"]
CMD ["serve"]
