#!/bin/sh
# Writes the lock files from pyproject.toml: exact versions for Python 3.11 and 3.12, one file for each kind of device.
#
#   dev.lock         what `make` installs: cpu.lock, and what the tests need
#   cpu.lock         Linux, macOS and Windows, with the embedded servers
#   cuda.lock        Linux with CUDA
#   directml.lock    Windows with DirectML (torch-directml included)
#   windowsml.lock   Windows with the maintained build of the same provider (inference only)
#   peers.lock       the model servers that benchmarks compare with, for a Python environment of their own
#   kserve.lock      KServe's client, which tests speak with, for one of its own too
#
# Versions that a lock already has are kept; `./compile.sh --upgrade` takes new ones. Needs uv (`pip install uv`).
set -eu
cd "$(dirname "$0")/.."

compile() {
    name=$1
    shift
    uv pip compile pyproject.toml --group server --python-version 3.11 --no-emit-index-url --no-header --no-annotate --quiet \
        "$@" --output-file "requirements/$name.lock"
    # Python 3.13 is outside of requires-python anyway: saying so on every line hides the markers that matter.
    sed -i -e "s/ ; python_full_version < '3.13'$//" -e "s/python_full_version < '3.13' and //" "requirements/$name.lock"
}

# The CUDA libraries are left out where only the CPU is meant: the wheel of torch that needs them asks for its own exact versions, and
# the CPU's wheel, wherever an index or a folder of wheels offers it, needs none.
without_cuda=$(printf ' --no-emit-package %s' cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas \
    nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile \
    nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink \
    nvidia-nvshmem-cu13 nvidia-nvtx triton)

# shellcheck disable=SC2086 # a list of options
compile dev --universal --group cpu --group pipelines --group local --group dev $without_cuda "$@"
# shellcheck disable=SC2086
compile cpu --universal --group cpu --group pipelines --group local -c requirements/dev.lock $without_cuda "$@"
compile cuda --python-platform linux --group cuda --group pipelines --group local -c requirements/dev.lock "$@"
compile directml --python-platform windows --group directml --group pipelines --group local -c requirements/torch-2.4.txt "$@"
compile windowsml --python-platform windows --group windowsml --group local -c requirements/dev.lock "$@"

# Not ours: what benchmarks compare with. PyTriton has wheels for Linux with glibc 2.35 and later only.
uv pip compile requirements/peers.in --python-version 3.11 --python-platform x86_64-manylinux_2_35 --no-emit-index-url --no-header \
    --no-annotate --quiet "$@" --output-file requirements/peers.lock
uv pip compile requirements/kserve.in --python-version 3.11 --no-emit-index-url --no-header --no-annotate --quiet "$@" \
    --output-file requirements/kserve.lock
