# The engine with CUDA 13, DALI and FFmpeg, for drivers from 580 on:
#   docker build -t pite-engine .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v DATA:/data -v RUNS:/runs pite-engine python -m engine.train --help
# --ipc=host gives NCCL and the data loader the host's shared memory. NCCL and cuDNN come with torch's wheels.
# The CUDA toolkit is there for flash-attn, which is compiled on request: --build-arg FLASH_ATTN=2.8.3.post2
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# "video" makes the driver's NVDEC library visible, which DALI decodes with.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ffmpeg python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pite-engine
COPY constraints.txt ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install -c constraints.txt torch 'setuptools>=77' wheel cmake ninja

ARG FLASH_ATTN=
RUN if [ -n "$FLASH_ATTN" ]; then pip install -c constraints.txt packaging psutil && pip install --no-build-isolation "flash-attn==$FLASH_ATTN"; fi

COPY . .
RUN pip install -c constraints.txt --no-build-isolation -e ./kernels -e '.[dev,annotate]'
