# Any Debian-like base with, or with a package of, Python 3.11 or newer serves; the wheels bring CUDA themselves.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

# gcc and the libc headers stay: triton compiles its launcher at run time. The versions are the base's own.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev tini \
    && (python3 -m ensurepip --version \
        || apt-get install -y --no-install-recommends python3 python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*

# One layer for the packages, which changes with their pins alone. EXTRAS: eval, or nothing.
ARG EXTRAS=
COPY requirements.txt requirements-eval.txt /opt/lora-stages/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -r /opt/lora-stages/requirements.txt \
        ${EXTRAS:+-r "/opt/lora-stages/requirements-${EXTRAS}.txt"}

COPY env/*.env /opt/lora-stages/env/
COPY stages /opt/lora-stages/stages

# Whatever the user ID and however the root file system is mounted, what is written goes to scratch or a volume.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/lora-stages \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=stages \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN install -d -o 10001 -g 0 -m 0775 /cache /runs

LABEL org.opencontainers.image.title="lora-stages" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:0
STOPSIGNAL SIGTERM
WORKDIR /opt/lora-stages
ENTRYPOINT ["tini", "-g", "--", "python", "-m", "stages"]
CMD ["--help"]
