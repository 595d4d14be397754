#!/usr/bin/env bash
# run.sh RIG      proves the DirectML backend on the genuine Windows libraries, without Windows or a GPU
#
#   RIG       the folder of the DirectML rig (its setup.sh and run.sh); builds the rig in RIG_DIR (/var/tmp/rig), or what
#             has changed of it
#
# Runs the conformance suite of tests/devices and the tests of this folder as sys.platform == 'win32', in several
# processes, because there a session's memory comes back only when its process ends; then the tests that drive a whole
# Windows worker from Linux. Exit status 0 if all passed. Needs root and Debian, as the rig does.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
[ $# = 1 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2; }
rig=$(cd "$1" && pwd)
root=${RIG_DIR:-/var/tmp/rig}
site=$project/.cache/rig-site
python=${PYTHON:-$project/.venv/bin/python}

"$rig/setup.sh" "$root"
# Shaders that Mesa has compiled are kept: a model's first run takes seconds to minutes without them.
shaders=$root/shaders
mkdir -p "$shaders"

wanted=$(sha256sum <"$here/requirements.txt")
if [ "$(cat "$site/.installed" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$site"
    "$python" -m pip install -q --disable-pip-version-check --no-deps --only-binary=:all: --no-compile \
        --platform win_amd64 --python-version 3.11 --implementation cp --target "$site" -r "$here/requirements.txt"
    echo "$wanted" >"$site/.installed"
fi

failed=0
said=$(mktemp)
exports=$(mktemp -d)
trap 'rm -rf "$said" "$exports"' EXIT
# A tiny pipeline and what it gives on the CPU: the rig has no libraries to make one with.
(cd "$project" && OMP_NUM_THREADS=1 "$python" -m tests.directml.exports "$exports")
# inside CONFTEST_FOLDER PYTEST_ARGUMENT...      one Windows process of pytest
#
# A process that ends before pytest has told its counts was ended by the rig itself (docs/directml.md tells of that), and
# is run once more, which is said. What pytest told counts.
inside() {
    local folder=$project/tests/$1 attempt
    shift
    for attempt in 1 2; do
        echo "== as win32: $*"
        "$rig/run.sh" "$root" --mount "$project" --mount "$shaders" --mount "$exports" --timeout 300 \
            --env "PIPELINES=$exports" \
            --env "PYTHONPATH=$site;$project" --env OMP_NUM_THREADS=1 --env "MESA_SHADER_CACHE_DIR=$shaders" \
            --env "RIG_REMOVED_FILE=$shaders/removed" -- -m pytest -c "$project/pyproject.toml" --rootdir "$project" --confcutdir "$folder" -p no:cacheprovider -q \
            "$@" 2>&1 | tr -d '\0' | grep -v cpuinfo | tee "$said" && return
        if grep -qE '[0-9]+ (passed|failed|error)' "$said"; then break; fi
        echo "== the process ended before pytest did (attempt $attempt of 2)"
    done
    failed=1
}

devices=$project/tests/devices directml=$project/tests/directml
inside devices "$devices/test_memory.py" -k directml
once="free_dimensions or every_dtype or every_level"   # each of these makes a session of its own
inside devices "$devices/test_models.py" -k "directml and not ($once)"
inside devices "$devices/test_models.py" -k "directml and ($once)"
inside devices "$devices/test_models_in_allocations.py" -k directml
inside devices "$devices/test_host_arrays.py" -k directml
inside devices "$devices/test_stopping.py" -k directml
inside devices "$devices/test_model_files.py" "$devices/test_tensors.py" "$devices/test_facts.py" \
    -k "test_facts or directml"
inside directml "$directml/test_adapters.py" "$directml/test_errors.py"
inside directml "$directml/test_sessions.py"
inside directml "$directml/test_training.py"
inside directml "$directml/test_pipelines.py"

echo "== a whole worker as win32, driven from Linux"
(cd "$project" && RIG=$rig RIG_DIR=$root "$python" -m pytest tests/directml/test_worker.py -p no:cacheprovider -q) || failed=1
exit $failed
