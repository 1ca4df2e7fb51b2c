# Any Debian-like base with, or with a package of, Python 3.11 or newer serves; the wheels bring CUDA themselves.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

# cu13 (driver 580 or newer), cu12 (525 or newer), or cpu.
ARG TORCH=cu13
# gcc and the headers stay, but for the CPU: triton compiles its launcher at run time. The versions are the base's own.
# hadolint ignore=DL3008
RUN gpu="${TORCH#cpu}" \
    && apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates tini ${gpu:+gcc libc6-dev} \
    && (python3 -m ensurepip --version \
        || apt-get install -y --no-install-recommends python3 python3-venv ${gpu:+python3-dev}) \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log

# One layer for the packages, which changes with their lock alone. EXTRAS: eval, trackers, or nothing. A proxy, a mirror or a
# certificate that pip needs comes as a secret, `--secret id=pip,src=pip.conf`, which stays in no layer.
ARG EXTRAS=
ARG TORCH_INDEX_URL=
COPY env/locks/${TORCH}${EXTRAS:+-${EXTRAS}}.txt /opt/lora-stages/requirements.txt
# Bytecode is for what stages import: the file system may be read-only later. Of no use without a GPU and a compiler
# are torch's headers and the kernels of bitsandbytes.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/venv \
    && PIP_EXTRA_INDEX_URL="${TORCH_INDEX_URL}" /opt/venv/bin/pip install --no-cache-dir --no-compile \
        --only-binary :all: --require-hashes -r /opt/lora-stages/requirements.txt \
    && ([ "${TORCH}" != cpu ] || find /opt/venv -regextype posix-extended \
        -regex '.*/torch/(include|test)/.*|.*/libbitsandbytes_(cuda|rocm|xpu)[^/]*' -delete) \
    && /opt/venv/bin/python -m compileall -q -x '/(tests?|transformers/models/(?!auto|llama|mistral|qwen|gemma|phi))' \
        /opt/venv/lib

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
