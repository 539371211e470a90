# An image with raylm, for KubeRay and other clusters that start containers.
#
#   docker build --tag REGISTRY/raylm:latest .                               nodes with GPUs
#   docker build --tag REGISTRY/raylm:cpu --build-arg DEVICE=cpu .           nodes without
#
# torch for Linux comes with CUDA, which a CPU image does not need: give the address of PyTorch's CPU builds as
# --build-arg PIP_EXTRA_INDEX_URL=…, and the image is some GB smaller. constraints.txt pins the version alone.
#
# Not built where raylm is developed, which has no Docker. tests/test_cluster_files.py checks the tag of the base image
# against Ray's version, and the files that are copied.
ARG RAY=2.60.0
ARG PYTHON=py311
ARG DEVICE=gpu
FROM rayproject/ray:${RAY}-${PYTHON}-${DEVICE}

ARG PIP_EXTRA_INDEX_URL=
WORKDIR /home/ray/raylm
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users configs ./configs
COPY --chown=ray:users raylm ./raylm
RUN pip install --no-cache-dir --constraint constraints.txt '.[all]' boto3
# The directory in which Ray starts its processes: raylm is an installed package there, not a folder of this name.
WORKDIR /home/ray
